"""What a person sees of the program, each screen as a whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.cli import COMMANDS
from reembed.transforms.embedders.fake import POISON
from tests.conftest import Call, make_store, memory
from tests.wording import wording

HELP = {
    "reembed": snapshot("""\
usage: reembed [-h] [--db FILE] [--namespace NAME] [--dry-run] [--batch N]
               [--json] [--version] [--model NAME] [--backend NAME] [--dim N]
               [--runner NAME] [--missing-only] [--skip-current-space]
               [--retry-skipped] [--stamp-only] [--no-hidden] [--max-rows N]
               [--partial] [--store KIND] [--table NAME] [--key COLUMN]
               [--text COLUMN] [--vector COLUMN] [--text-table NAME]
               [--text-key COLUMN] [--format NAME] [--dim-column COLUMN]
               [--space-column COLUMN] [--space NAME]
               [--namespace-column COLUMN] [--where SQL] [--config FILE]
               [--fresh] [--run-dir DIR] [--skipped WHAT]
               [--max-skipped SHARE] [--one-transaction]
               [--document-prefix TEXT] [--workdir URI] [--sleep-ms N]
               [--device NAME] [--precision NAME] [--base-url URL]
               [--in-flight N] [--give-up-after TIME] [--timeout TIME]
               [--max-tokens N] [--price-per-million X] [--key-secret NAME]
               [--insecure-key]

Re-embed every memory of an ai-memory database with another model: each
row's text is embedded, and at the end all stored vectors are replaced at once.

options:
  -h, --help            show this help message and exit
  --db FILE             the database
  --namespace NAME      only the rows of exactly this namespace
  --dry-run             print the plan and stop; not a byte is changed
  --batch N             most texts in a request (0: as set, or 100); a local
                        model gets 256, or N if more
  --json                print the result as one line of JSON
  --version             print the version and stop
  --model NAME          a model: by name or directory here, by name at a
                        server
  --backend NAME        what embeds: local, or the kind of server
  --dim N               refuse a model of another dimension
  --runner NAME         one of DirectRunner, BundleBasedDirectRunner,
                        DataflowRunner, FlinkRunner, FnApiRunner,
                        PortableRunner

which rows:
  --missing-only        only rows that have no vector
  --skip-current-space  not rows whose stamp and length are the target's
  --retry-skipped       only rows that the last run skipped
  --stamp-only          stamp the model's own vectors, embed a sample
  --no-hidden           leave out rows that ai-memory hides (tombstoned,
                        quarantined)
  --max-rows N          stage N rows now, the rest the next time
  --partial             with --max-rows: replace those rows at once

which store, if not an ai-memory database:
  --store KIND          ai-memory, llm, sqlite-vec or table (found out from
                        the file)
  --table NAME          the table that has the rows
  --key COLUMN          names a row (its primary key)
  --text COLUMN         what is embedded; several are joined by a space; or a
                        template, '{title}: {body}'
  --vector COLUMN       where the vector is
  --text-table NAME     the table that has the texts of a vec0 table
  --text-key COLUMN     its column with the vec0 table's key (its INTEGER
                        PRIMARY KEY)
  --format NAME         f32le (if not given), f32be, f64le, f16le, json, npy
  --dim-column COLUMN   where a vector's length is
  --space-column COLUMN
                        where the name of its model is
  --space NAME          what the store calls the model (its own name)
  --namespace-column COLUMN
                        what --namespace is about
  --where SQL           only the rows for which this condition is true
  --config FILE         the same as TOML: table = 'docs', text = ['title',
                        'body']

how:
  --fresh               start over; discard what an earlier try staged
  --run-dir DIR         where to stage and keep the backup (beside FILE)
  --skipped WHAT        keep (if not given) or clear a skipped row's vector
  --max-skipped SHARE   replace nothing if more of the tried rows failed (50%)
  --one-transaction     replace all at once above 50,000 rows too
  --document-prefix TEXT
                        what stands before each text
  --workdir URI         a place for texts and vectors on any file system of
                        Beam (a path, gs://, s3://, hdfs://), for workers that
                        can't reach FILE
  --sleep-ms N          wait after each batch
  --device NAME         cpu, cuda, mps (the fastest that is there)
  --precision NAME      or float16, bfloat16: other vectors

a server that embeds:
  --base-url URL        where it is (as set, or the backend's own)
  --in-flight N         most requests at a time (as many as it can do with, up
                        to 32)
  --give-up-after TIME  end the run if it is down for so long (10m)
  --timeout TIME        for one answer (2m)
  --max-tokens N        stop before more are spent
  --price-per-million X
                        what a million tokens cost
  --key-secret NAME     read the key from Google's Secret Manager:
                        projects/P/secrets/S/versions/V
  --insecure-key        send the key over http to another machine

commands that look after runs (reembed COMMAND --help):
  status    the runs on a database, how far they have come, what to do next
  verify    check the table against a run, and a sample against the model
  rollback  put the previous vectors back
  cleanup   remove runs that have ended

exit codes:
  0  done, or the plan printed (skipped rows are named on stderr)
  1  failed; the message says whether the store is unchanged
  2  wrong usage or settings, or no embedder configured
  3  the embedder could not be built
  4  a stamp was refused; the store is unchanged
  5  too many rows failed; the store is unchanged
  6  the replacement is incomplete: run again to finish it, or roll back
  130, 143  interrupted (Ctrl-C, SIGTERM); the same command goes on

Flags that are not given are taken from ai-memory's environment variables and
its configuration file; with none, the model is all-MiniLM-L6-v2, run here.
Beam's own options stand after "--":
  reembed --runner PortableRunner -- --job_endpoint=localhost:8099
"""),
    "status": snapshot("""\
usage: reembed status [-h] [--db FILE] [--run-dir DIR] [--json]

Show the runs on a database: state, rows, skips, size on disk and next step.

options:
  -h, --help     show this help message and exit
  --db FILE      the database
  --run-dir DIR  where the run was staged, if not beside FILE
  --json         print the result as one line of JSON
"""),
    "verify": snapshot("""\
usage: reembed verify [-h] [--db FILE] [--run-dir DIR] [--run ID]
                      [--model DIR] [--backend NAME] [--base-url URL]
                      [--key-secret NAME] [--insecure-key] [--json]

Check each vector of the table against the run that wrote it: length, numbers,
norm and digest, and a sample of rows against the model.

options:
  -h, --help         show this help message and exit
  --db FILE          the database
  --run-dir DIR      where the run was staged, if not beside FILE
  --run ID           the run (the newest that fits)
  --model DIR        where the run's model is now, if not at a server
  --backend NAME     the kind of the run's server, as the run had it
  --base-url URL     where the run's server is now
  --key-secret NAME  read the key from Google's Secret Manager:
                     projects/P/secrets/S/versions/V
  --insecure-key     send the key over http elsewhere
  --json             print the result as one line of JSON
"""),
    "rollback": snapshot("""\
usage: reembed rollback [-h] [--db FILE] [--run-dir DIR] [--run ID] [--json]

Put the vectors back that a run replaced. Rows whose text or vector changed
since are left as they are, and named.

options:
  -h, --help     show this help message and exit
  --db FILE      the database
  --run-dir DIR  where the run was staged, if not beside FILE
  --run ID       the run (the newest that fits)
  --json         print the result as one line of JSON
"""),
    "cleanup": snapshot("""\
usage: reembed cleanup [-h] [--db FILE] [--run-dir DIR] [--run ID] [--yes]
                       [--json]

Remove runs that have ended. A backup that is the only way back to a former
model's vectors is kept unless --yes is given.

options:
  -h, --help     show this help message and exit
  --db FILE      the database
  --run-dir DIR  where the run was staged, if not beside FILE
  --run ID       only this run
  --yes          also remove the only way back
  --json         print the result as one line of JSON
"""),
}


@pytest.mark.parametrize("command", HELP)
def test_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reembed.pipeline.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    named = [] if command == "reembed" else [command]

    with pytest.raises(SystemExit) as ended:
        main([*named, "--help"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == HELP[command]
    assert HELP.keys() == {"reembed", *COMMANDS}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store in which some rows can't be embedded."""
    old: dict[str, Any] = {"embedding": b"\x01" + bytes(12), "embedding_dim": 3}
    rows = [
        *(memory(f"{at}", **old) for at in range(6)),
        memory("6", namespace="notes"),
        memory("7", POISON, namespace="notes", **old),
        memory("8", "", encrypted_envelope=b"e"),
    ]
    return make_store(tmp_path / "m.db", rows)


def screen(said: str, tmp_path: Path) -> str:
    """What is shown, with letters for what was measured and for what a file takes on a disk."""
    said = re.sub(r"[\d.,]+ (bytes|KiB|kB|MB)\b", "SIZE", wording(said, tmp_path))
    said = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "THEN", said)
    said = re.sub(r"(?m)^reembed: \d+ of \d+ rows embedded.*\n", "", said)  # Where it is slow.
    return re.sub(r"\d+\.\d s\b", "N s", said)


def test_a_plan_a_run_its_status_its_check_and_the_way_back(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    plan = reembed("--db", path, "--dry-run", range_rows=4)
    assert screen(plan.err, tmp_path) == snapshot("""\
reembed: PRE-FLIGHT — stored embedding dims: [3]; target: 8-dim (all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will be REPLACED
reembed: NOTE — stored vectors of dimension 3 can't be compared with the target's 8; they are replaced all at once, and until then the store stays as it is
""")  # noqa: E501
    assert screen(plan.out, tmp_path) == snapshot("""\
reembed plan: total_rows=9 rows_with_embeddings=7 rows_missing_embeddings=2 target_model='all-MiniLM-L6-v2 (8-dim, fake)' target_dim=8 backend=ollama (dry-run: nothing written)

database         TMP/m.db
store            an ai-memory database
rows             9 (8 to embed)
namespaces       global 7, notes 2
stored vectors   3-dim 7, no vector 2
skipped by rule  encrypted 1
target           all-MiniLM-L6-v2 (8-dim, fake)
tokens           not estimated (no text to sample, or no fast tokenizer)
staged in        TMP/m.db.reembed/RUN

settings, and where each came from:
db       TMP/m.db (--db)
tier     semantic (default)
backend  local (default)
model    all-MiniLM-L6-v2 (default)
batch    100 (default)
egress   allow (default)
""")  # noqa: E501
    nothing = reembed("status", "--db", path)
    assert screen(nothing.out, tmp_path) == snapshot(
        "no runs on TMP/m.db; nothing is staged, nothing to undo\n"
    )
    part = reembed("--db", path, "--max-rows", "3", range_rows=4)
    assert screen(part.out, tmp_path) == snapshot("""\
reembed: 3 of 9 rows staged, nothing is replaced yet

staged now  3 embedded, 0 skipped
time        N s
forecast    5 rows are left, about N s at this pace
staged in   TMP/m.db.reembed/RUN
next        the same command goes on; without --max-rows it stages the rest and replaces
""")
    staged = reembed("status", "--db", path)
    assert screen(staged.out, tmp_path) == snapshot("""\
run RUN, begun THEN
state      staging
target     all-MiniLM-L6-v2 (8-dim)
about      all, all namespaces
rows       9
staged     3
on disk    SIZE, of which the backup SIZE
directory  TMP/m.db.reembed/RUN
next       rerun the same command to resume; --fresh starts over
""")

    done = reembed("--db", path, range_rows=4)

    assert screen(done.err, tmp_path) == snapshot("""\
reembed: PRE-FLIGHT — stored embedding dims: [3]; target: 8-dim (all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will be REPLACED
reembed: NOTE — stored vectors of dimension 3 can't be compared with the target's 8; they are replaced all at once, and until then the store stays as it is
reembed: 3 of 9 rows are staged; going on (run RUN)
reembed: loading all-MiniLM-L6-v2 (8-dim, fake)
WARN [RUN] skipped row 7: the text holds POISON (previous vector kept)
WARN [RUN] skipped row 8: its content is encrypted (previous vector kept)
""")  # noqa: E501
    assert screen(done.out, tmp_path) == snapshot("""\
reembed: 7/9 re-embedded, 2 skipped (model all-MiniLM-L6-v2 (8-dim, fake), 8-dim, N ms)

rows         9
re-embedded  7
skipped      encrypted 1, rejected by the model 1 (previous vectors kept)
old vectors  1 rows still hold a vector that this run did not make; searches can't compare it with the new ones
time         N s (N rows/s)
model        all-MiniLM-L6-v2 (8-dim, fake)
dimension    8 (was 3)
way back     reembed rollback puts the previous vectors back
next         restart the ai-memory daemon with this model; it keeps its index in memory
""")  # noqa: E501
    status = reembed("status", "--db", path)
    assert screen(status.out, tmp_path) == snapshot("""\
run RUN, begun THEN
state        replaced
target       all-MiniLM-L6-v2 (8-dim)
about        all, all namespaces
rows         9
re-embedded  7
skipped      2
on disk      SIZE, of which the backup SIZE
directory    TMP/m.db.reembed/RUN
next         reembed verify checks it; reembed rollback undoes it
""")
    checked = reembed("verify", "--db", path)
    assert screen(checked.out, tmp_path) == snapshot("""\
reembed verify: all is as the run left it

run             RUN
rows checked    7
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  2 (skipped, or added since)
sample          7 rows embedded again, lowest cosine 1.000000
wrong           none
""")
    back = reembed("rollback", "--db", path)
    assert screen(back.out, tmp_path) == snapshot("""\
reembed: run RUN is rolled back

restored   7 rows hold their previous vectors again
as before  0 rows
left       0 rows
next       set the ai-memory daemon back to the former model and restart it
""")
    removed = reembed("cleanup", "--db", path)
    assert screen(removed.out, tmp_path) == snapshot("""\
reembed: 1 runs removed, SIZE freed

RUN  removed
""")
