#!/usr/bin/env bash
# Sets up if needed, then runs reembed; every argument passes through.
# Without any database it uses a demo store, which it makes.
set -euo pipefail
here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
"$here/tools/venv" offline,openvino
export REEMBED_DEMO_STORE="${REEMBED_DEMO_STORE:-$here/demo/ai-memory.db}"
exec "$here/.venv/bin/reembed" "$@"
