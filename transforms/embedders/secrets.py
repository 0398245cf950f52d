"""Keys that are kept in Google's Secret Manager, for workers that get no variable and no file."""

from __future__ import annotations

from transforms.errors import EmbedderError


def fetch_secret(name: str) -> str:
    """Fetch a secret, `projects/PROJECT/secrets/NAME/versions/VERSION`, as this machine's user.

    Raises EmbedderError if Google's packages are not installed, or it can't be had.
    """
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud import secretmanager
    except ImportError:
        raise EmbedderError(
            f"the key is to be read from {name}, but Google's packages are not installed here: "
            "pip install '.[gcp]' in the checkout of reembed"
        ) from None
    try:
        client = secretmanager.SecretManagerServiceClient()
        answer = client.access_secret_version(name=name, timeout=60)
        secret: str = answer.payload.data.decode()
    except (GoogleAPIError, GoogleAuthError, UnicodeDecodeError) as error:
        # Not what it decodes to: the message must not hold the key.
        why = type(error).__name__ if isinstance(error, UnicodeDecodeError) else error
        raise EmbedderError(
            f"the key can't be read from {name} ({why}); correct --key-secret, or let this "
            "machine's service account read it"
        ) from None
    return secret.strip()
