"""Exceptions for user errors; each message says what is wrong and what to do.

    ImagineError            the input is wrong; the command line prints the message and exits with 2
    ├── PictureError        a picture file cannot be read or used
    ├── FaceError           the picture does not hold exactly the requested face
    ├── PromptError         the prompt cannot be used
    ├── WeightsError        a weights folder or file does not fit
    ├── SafetyError         a safety classifier refuses a prompt or a photo
    ├── ConsentError        a persona may not be used
    ├── ConfigError         a configuration has an unknown name or contradicts itself
    └── BadRecordError      one record of a data set cannot be used; the others can

Any other exception is a bug in imagine (exit code 1).
"""


class ImagineError(ValueError):
    """Raised when the input is wrong; the message says what is wrong and what to do."""


class PictureError(ImagineError):
    """Raised when a picture file cannot be read or used."""


class FaceError(ImagineError):
    """Raised when the picture does not hold exactly the requested face."""


class PromptError(ImagineError):
    """Raised when the prompt cannot be used."""


class WeightsError(ImagineError):
    """Raised when a weights folder or file does not fit."""


class SafetyError(ImagineError):
    """Raised when a safety classifier refuses a prompt or a photo; the message has its reason."""


class ConsentError(ImagineError):
    """Raised when a persona may not be used, because the consent that it records has expired."""


class ConfigError(ImagineError):
    """Raised when a configuration has an unknown name or contradicts itself."""


class BadRecordError(ImagineError):
    """Raised when one record of a data set cannot be used; the others can."""
