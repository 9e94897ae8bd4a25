"""Files that hold something else than their names say: pointers, web pages and messages that a download left."""

import re

HEAD_BYTES = 1024  # of a file, that `what_instead` needs

_KINDS = {
    rb"version https?://(?:git-lfs|hawser)\.github\.com/spec/": "a Git LFS pointer, not the file: run git lfs pull",
    rb"(?:\.\./)*(?:\.git)?/annex/objects/": "a git-annex pointer, not the file: run git annex get",
    rb"(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head)\b": (
        "an HTML page, as a site sends it in place of a file that needs a login: log in and download it again"
    ),
    rb"(?:<\?xml[^>]*>\s*)?<error\b|(?:entry|repository|file) not found|invalid (?:username|credentials)|"
    rb"access to (?:dataset|model) .{1,200} is restricted|access ?denied|(?:404|403)[ :]": (
        "the error message of a server, not the file: download it again"
    ),
}
_PATTERNS = {re.compile(pattern, re.IGNORECASE | re.DOTALL): what for pattern, what in _KINDS.items()}


def what_instead(head: bytes) -> str | None:
    """Returns what a file is instead of what it should be, such as "is empty (0 bytes): download it again", or None.

    Args:
      head: the first HEAD_BYTES of the file, or all of it.
    """
    if not head:
        return "is empty (0 bytes): download it again"
    text = head[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((f"is {what}" for pattern, what in _PATTERNS.items() if pattern.match(text)), None)
