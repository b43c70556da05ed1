"""What a user can do wrong, as exceptions whose message is one sentence that says what to do.

    ImagineError            the input is wrong; the command line prints the sentence and exits with 2
    ├── PictureError        a picture file cannot be read or used
    ├── FaceError           the picture does not hold exactly the face that was asked for
    ├── PromptError         the sentence cannot be used
    ├── WeightsError        a weights folder or file does not fit
    ├── ConfigError         a configuration names something unknown or contradicts itself
    └── BadRecordError      one record of a data set cannot be used; the others can

Anything else that escapes is our own fault (exit code 1).
"""


class ImagineError(ValueError):
    """The input is wrong; the message is one sentence that says what to do."""


class PictureError(ImagineError):
    """A picture file cannot be read or used."""


class FaceError(ImagineError):
    """The picture does not hold exactly the face that was asked for."""


class PromptError(ImagineError):
    """The sentence cannot be used."""


class WeightsError(ImagineError):
    """A weights folder or file does not fit."""


class ConfigError(ImagineError):
    """A configuration names something unknown or contradicts itself."""


class BadRecordError(ImagineError):
    """One record of a data set cannot be used; the others can."""
