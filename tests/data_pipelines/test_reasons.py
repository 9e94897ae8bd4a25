"""Reasons as files store them."""

from data_pipelines.reasons import Reason

# In the order of the report. Quarantine files, lists of bad records and reports of earlier versions have these words.
STORED = """
    damaged archive, damaged annotation, missing image, unsafe name, absurd size, empty instruction, several sources,
    members apart, no images, ambiguous image, known to be corrupt, failed edit, file not there, another split,
    read already, empty file, not an image, cut short, damaged image, too many pixels, several frames, unknown colors,
    unreadable record, too small, too large, too long, sides differ in aspect, low score, later turn, nothing changed,
    id twice, exact duplicate, near-duplicate, image of validation, edit not done, rest not kept, no clear answer
"""


def test_words_of_earlier_files_keep_their_meaning() -> None:
    assert [Reason(word) for word in " ".join(STORED.split()).split(", ")] == list(Reason)
