"""Languages: names of codes, and the units in which a text is cut.

Knows the languages of PaLI's translated captions (CC3M-35L and English) and some more; a code that is not
here works wherever only the code is shown.
"""

from __future__ import annotations

import re

from vlm_adapt.data.problems import BadSample

NAMES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "bo": "Tibetan",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fil": "Filipino",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "iw": "Hebrew",  # the code of older data sets
    "ja": "Japanese",
    "km": "Khmer",
    "ko": "Korean",
    "lo": "Lao",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mi": "Maori",
    "my": "Burmese",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "quz": "Cusco Quechua",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}
WITHOUT_SPACES = {"bo", "ja", "km", "lo", "my", "th", "zh"}
_WORD, _CHARACTER = re.compile(r"\s*\S+"), re.compile(r"\s*\S")


def _primary(lang: str) -> str:
    """`zh` of "zh-Hans" and "ZH"."""
    return re.split("[-_]", lang.strip().lower())[0]


def name_of(lang: str) -> str:
    """The English name of a language code. Raises BadSample: it is not known here."""
    name = NAMES.get(_primary(lang))
    if name is None:
        raise BadSample("no name is known of its language: write {lang} in the prompt", lang)
    return name


def units(text: str, lang: str) -> list[str]:
    """A text in words, each with the white space before it; in characters where a language has no spaces.

    Joined they give the text without white space at its ends.
    """
    pattern = _CHARACTER if _primary(lang) in WITHOUT_SPACES else _WORD
    return pattern.findall(text.strip())
