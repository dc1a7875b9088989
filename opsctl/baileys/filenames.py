"""The names inside a folder of `useMultiFileAuthState`, and the name of the folder (docs/baileys.md section 1)."""

import re

CREDS_FILE = "creds.json"
MANIFEST_FILE = ".opsctl-manifest.json"

_LONGEST_NAME = 255  # NAME_MAX of ext4 and xfs, in bytes
_SHOWN = 60  # characters of a bad name that a message repeats

# Longest first, so that `sender-key-memory-X` is not read as the sender-key `memory-X`.
_TYPES = (
    "app-state-sync-version",
    "app-state-sync-key",
    "sender-key-memory",
    "identity-key",
    "device-list",
    "lid-mapping",
    "sender-key",
    "pre-key",
    "session",
    "tctoken",
)
_KEY_FILE = re.compile(rf"({'|'.join(_TYPES)})-(.*)\.json", re.DOTALL)
_UNKNOWN_KEY_FILE = re.compile(r"([^-]+)-(.*)\.json", re.DOTALL)
_SENDER_KEY = re.compile(r"(.+)--([^-]+)--([0-9]+)", re.DOTALL)
_IGNORED = re.compile(r".+\.json(?:\.[^/]*)?\.(?:tmp|bak)", re.DOTALL)
_COMPANY_ID = re.compile(r"[A-Za-z0-9_-]{1,50}")
_COMPANY_PREFIX = "company_"


class UnwritableName(ValueError):
    """This key cannot be a file that Baileys would find again."""


def fix_file_name(text: str) -> str:
    """Baileys' `fixFileName`. Not injective: `a/b` and `a__b`, `a:b` and `a-b` meet.

    >>> fix_file_name("sender-key-123@g.us::456::7.json")
    'sender-key-123@g.us--456--7.json'
    """
    return text.replace("/", "__").replace(":", "-")


def key_file_name(key_type: str, key_id: str) -> str:
    """The file of one key, or UnwritableName.

    >>> key_file_name("app-state-sync-key", "AAA/B=")
    'app-state-sync-key-AAA__B=.json'
    """
    name = f"{key_type}-{key_id}.json"
    if "/" in name or ":" in name:
        name = fix_file_name(name)
    # All but every key is short ASCII. A name made here ends in .json and holds a hyphen, so it cannot be `.`, `..` or
    # creds.json; it could be the manifest's.
    if name.isascii() and len(name) <= _LONGEST_NAME and "\0" not in name and name[0] != ".":
        return name
    return _examined(name)


def _examined(name: str) -> str:
    if "\0" in name:
        raise UnwritableName(f"a file name cannot hold a NUL character: {_shown(name)}")
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        raise UnwritableName(f"half a surrogate pair is no file name: {_shown(name)}") from None
    if size_bytes > _LONGEST_NAME:
        raise UnwritableName(f"a file name of {size_bytes} bytes, {_LONGEST_NAME} is the limit: {_shown(name)}")
    if is_ignored(name):
        raise UnwritableName(f"a file name that is not for keys: {_shown(name)}")
    return name


def _shown(name: str) -> str:
    """For a message: ASCII without control characters, and short."""
    return ascii(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!a}..."


def parse_key_file_name(name: str) -> tuple[str, str] | None:
    """(type, id) as well as a name tells them; None for what is no key file. The manifest knows better.

    >>> parse_key_file_name("sender-key-123-456@g.us--789_1--0.json")
    ('sender-key', '123-456@g.us::789_1::0')
    >>> parse_key_file_name("app-state-sync-key-AAA__B=.json")
    ('app-state-sync-key', 'AAA/B=')
    >>> parse_key_file_name("tctoken-__index.json")
    ('tctoken', '__index')
    >>> parse_key_file_name("creds.json")
    """
    match = _KEY_FILE.fullmatch(name) or _UNKNOWN_KEY_FILE.fullmatch(name)
    if match is None or is_ignored(name):
        return None
    key_type, key_id = match.groups()
    if key_type == "sender-key":
        parts = _SENDER_KEY.fullmatch(key_id)
        return key_type, "::".join(parts.groups()) if parts else key_id
    if key_type == "app-state-sync-key":  # base64, where `_` cannot occur
        return key_type, key_id.replace("__", "/")
    return key_type, key_id


def is_ignored(name: str) -> bool:
    """Whether a file is no key and no credentials: our manifest, or a `.tmp` or `.bak` beside a json.

    >>> is_ignored("session-1.0.json.bak"), is_ignored("session-1.0.json")
    (True, False)
    """
    if name.endswith(".json"):  # as nearly all do
        return name == MANIFEST_FILE
    return _IGNORED.fullmatch(name) is not None


def folder_name(company_id: str) -> str:
    """The company's folder; two ids may ask for the same one, which the caller has to refuse.

    >>> folder_name("962302"), folder_name("company_962302")
    ('company_962302', 'company_962302')
    """
    if not is_company_id(company_id):
        raise UnwritableName(f"not a company id: {_shown(company_id)}")
    return company_id if company_id.startswith(_COMPANY_PREFIX) else _COMPANY_PREFIX + company_id


def is_company_id(text: str) -> bool:
    r"""Whether `text` is what the service accepts as a company's id, and therefore cannot leave the folder.

    >>> is_company_id("962302"), is_company_id("../x"), is_company_id("962302\n")
    (True, False, False)
    """
    return _COMPANY_ID.fullmatch(text) is not None
