"""What a picture shows, as words that an attribute reader reads, compared with what was asked for."""

from collections.abc import Mapping

ABSENT = ("", "none")


def found(asked: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Return, for each attribute in the prompt, whether the reader found it; letters must agree in every character."""
    return {name: read.get(name) == word for name, word in asked.items()}


def leaked(asked: Mapping[str, str], reference: Mapping[str, str], read: Mapping[str, str]) -> dict[str, bool]:
    """Return whether the picture shows the reference's word, for each attribute where the prompt asked for another.

    An attribute that the reference lacks cannot leak: a missing hat counts as a prompt error, not as leakage.
    """
    return {
        name: read.get(name) == reference[name]
        for name, word in asked.items()
        if reference.get(name, word) not in (word, *ABSENT)
    }
