"""Keys that are kept in Google's Secret Manager, for workers that get no variable and no file."""

from __future__ import annotations

from reembed.transforms.errors import EmbedderError


def fetch_secret(name: str) -> str:
    """Fetch a secret, `projects/PROJECT/secrets/NAME/versions/VERSION`, as this machine's user.

    Raises EmbedderError if Google's packages are not installed, or it can't be had.
    """
    try:
        from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
        from google.cloud import secretmanager
    except ImportError:
        raise EmbedderError(
            "the key is to be read from the secret that --key-secret names, but Google's packages "
            "are not installed here: pip install '.[gcp]' in the checkout of reembed"
        ) from None
    try:
        client = secretmanager.SecretManagerServiceClient()
        answer = client.access_secret_version(name=name, timeout=60)
        secret: str = answer.payload.data.decode()
    except (GoogleAPIError, GoogleAuthError, UnicodeDecodeError) as error:
        match error:
            case NotFound():
                why = "there is no such secret or version"
            case Forbidden():
                why = "this machine's account may not read it"
            case DefaultCredentialsError():
                why = "nobody is logged in to Google here"
            case UnicodeDecodeError():
                why = "it is no text"
            case _:
                why = type(error).__name__
        raise EmbedderError(
            f"the key can't be read from the secret that --key-secret names ({why}); correct that "
            "flag, or let this machine's service account read the secret"
        ) from None
    return secret.strip()
