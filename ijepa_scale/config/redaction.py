"""Secrets out of what is shown and kept: a page of a run is sent to others, and so are its files and its log."""

import re
from typing import Any

HIDDEN = "[hidden]"
SECRET_KEY = re.compile(
    r"(?<!mask_)(?<!cls_)token(?!s)|secret|passw|credential|(?:api|access|wandb)\w*key|authorization", re.IGNORECASE
)
URLS = (  # what is kept, what is hidden
    (re.compile(r"(://)[^/\s]+@"), r"\1" + HIDDEN + "@"),  # a user and password, which may hold an @
    (re.compile(r"(://[^\s?#\"']*\?)[^\s#\"']+"), r"\1" + HIDDEN),  # a query, as a signed URL has
    (re.compile(r"()\b(?:hf_\w{16,}|gh[a-z]_\w{16,}|wandb_v\d_\w+|AKIA\w{12,})"), r"\1" + HIDDEN),
)
TEXTS = (  # besides
    *URLS,
    (re.compile(r"(\b(?:bearer|basic)\s+)\S+", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(rf"([\w.-]*(?:{SECRET_KEY.pattern})[\w.-]*\s*[=:]\s*)[^\s,}}\]]+", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"(wandb[\w.-]*\s*[=:]\s*)\w{32,}", re.IGNORECASE), r"\1" + HIDDEN),
)


def redacted(value: Any, key: str = "", texts: Any = TEXTS) -> Any:
    """A value of YAML or JSON without what looks like a secret: under such a key, or in a text, as a URL.

    texts: what is looked for in texts.
    """
    if isinstance(value, dict):
        return {redacted(name, texts=texts): redacted(item, str(name), texts) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key, texts) for item in value]
    if value not in (None, "") and not isinstance(value, bool) and SECRET_KEY.search(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    if "wandb" in key.lower() and re.fullmatch(r"\w{32,}", value):  # a key where a name belongs
        return HIDDEN
    for pattern, kept in texts:
        value = pattern.sub(kept, value)
    return value


def without_secrets(value: Any) -> Any:
    """A config, a record or a line less the secrets that are so beyond doubt: all else stays to the letter.

    Those of URLs, tokens by their form, and values under keys that are named so.
    """
    return redacted(value, texts=URLS)
