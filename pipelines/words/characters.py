"""What each code point is to the word, sentence and line rules: one table of flags, looked up by the kernels.

Letters, digits, marks, spaces and symbols are Unicode's. Which characters come off the ends of a word, join or cut it
are those of spaCy's English tokenizer; which end a sentence, those of its sentencizer; which do not make a word count,
and which end a line, those of datatrove.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

SPACE = 1 << 0  # str.isspace
LETTER = 1 << 1  # str.isalpha
SOLID = 1 << 2  # letters, marks and numbers
MARK = 1 << 3  # marks, which stay with the character before them
SINGLE = 1 << 4  # letters and numbers of scripts that put no spaces between words: each is a word
WORDY = 1 << 5  # whatever Gopher's rules (as datatrove reads them) do not call punctuation
PUNCT = 1 << 6  # Unicode's punctuation
STOP = 1 << 7  # ends a sentence
TERMINAL = 1 << 8  # ends a line, for FineWeb's rule
PREFIX = 1 << 9  # comes off the front of a word
SUFFIX = 1 << 10  # comes off its end
LOWER = 1 << 11  # letters in lower case, or without case
UPPER = 1 << 12  # letters in upper case, or without case
QUOTE = 1 << 13
DOTTED = 1 << 14  # a full stop after one of these comes off the end of a word
ICON = 1 << 15  # symbols such as emoji, which cut a word wherever they stand
CURRENCY = 1 << 16
DIGIT = 1 << 17  # 0 to 9
LABEL = 1 << 18  # may stand in a host name
NAME = 1 << 19  # may stand in the name of a protocol
COMPLEX = 1 << 20  # a word that holds one of these needs to be looked at character by character
HYPHEN = 1 << 21

CODES = 0x110000
_LAST = 0x32400  # beyond lie tags and variation selectors (below), private use and what is not assigned
_TAGS = range(0xE0000, 0xE0200)

# Closing marks of sentences, in ranges; the second list ends lines for FineWeb but no sentence for spaCy.
_STOPS = (
    "21 2E 3F 589 61F 6D4 700-702 7F9 964-965 104A-104B 1362 1367-1368 166E 1735-1736 1803 1809 1944-1945 1AA8-1AAB "
    "1B5A-1B5B 1B5E-1B5F 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2E2E 2E3C 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 "
    "A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 11047-11048 "
    "110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9 1144B-1144C 115C2-115C3 "
    "115C9-115D7 11641-11642 1173C-1173E 11A42-11A43 11A9B-11A9C 11C41-11C42 16A6E-16A6F 16AF5 16B37-16B38 16B44 "
    "1BC9F 1DA88"
)
_LINE_STOPS = (
    "61D-61E 837 839 83D-83E 17D4-17D6 17D9-17DA 1B7D-1B7E 2E53-2E54 10F55-10F59 10F86-10F89 11944 11946 11EF7-11EF8 "
    "11F43-11F44 16E98"
)
_PUNCTUATION = (
    "0-8 B-1F 21-2F 3A-40 5B-60 7B-9F AB B4 BB 2013-2014 2019 201C-201E 2026 2236 2501 25BA 3001-3002 3008-300D "
    "3010-3011 FF01 FF05 FF08-FF09 FF0C FF0E FF11 FF1A-FF1B FF1F FF5E"
)
_PUNCT_MARKS = (
    "21 23 26 28-2A 2C 3A-3C 3E-3F 5B 5D 5F 7B 7D A1 B7 BF 60C 61B 61F 66A 6D4 964 2026 3001-3002 FF01 FF0C FF1A-FF1B "
    "FF1F FF5E"
)
_QUOTE_MARKS = "22 27 2C 60 AB B4 BB 2018-201A 201C-201E 2329-232A 27E6-27E7 3008-3011 3014-3015 FF08-FF09"
_DASHES = "2013 2014"
_CURRENCIES = "$£¥฿﷼" + "".join(map(chr, range(0x20A0, 0x20C0)))

# Scripts that put no spaces between words: Thai, Lao, Tibetan, Myanmar, Tai Le to Khmer symbols, Tai Tham, Balinese,
# Javanese and Myanmar extended, kana and bopomofo, Han (with compatibility forms and both supplementary planes), Yi.
_SPACELESS = (
    "E00-E7F E80-EFF F00-FFF 1000-109F 1780-17FF 1950-19FF 1A20-1AAF 1B00-1B7F 2E80-2FDF 3005-3007 3021-3029 3031-3035 "
    "3038-303B 3040-312F 31A0-31BF 31F0-31FF 3400-4DBF 4E00-9FFF A000-A4CF A980-A9DF A9E0-A9FF AA00-AA5F AA60-AADF "
    "F900-FAFF FF66-FF9F 1AFF0-1B16F 20000-323AF"
)


def _ranges(text: str) -> list[int]:
    codes: list[int] = []
    for part in text.split():
        first, _, last = part.partition("-")
        codes.extend(range(int(first, 16), int(last or first, 16) + 1))
    return codes


@functools.lru_cache(maxsize=1)
def flags() -> np.ndarray:
    """Flags of every code point, (0x110000,), uint32; some 0.1 s once a process."""
    table = np.zeros(CODES, np.uint32)
    for code in (*range(_LAST), *_TAGS):
        c = chr(code)
        category = unicodedata.category(c)
        flag = 0
        if category[0] == "L":
            flag = LETTER | SOLID
            if category in ("Ll", "Lo"):
                flag |= LOWER
            if category in ("Lu", "Lt", "Lo"):
                flag |= UPPER
        elif category[0] == "M":
            flag = MARK | SOLID
            if not 0x300 <= code <= 0x36F:
                flag |= LOWER | UPPER
        elif category[0] == "N":
            flag = SOLID
        elif category[0] == "P":
            flag = PUNCT
        elif category == "So":
            flag = ICON
        if c.isspace():
            flag |= SPACE
        if c == "_" or c.isalnum() or c in "+-.":
            flag |= NAME
        table[code] = flag

    def mark(codes: list[int] | str, flag: int) -> None:
        table[[ord(c) if isinstance(c, str) else c for c in codes]] |= np.uint32(flag)

    single = np.array(_ranges(_SPACELESS))
    single = single[(table[single] & SOLID != 0) & (table[single] & MARK == 0)]
    table[single] |= np.uint32(SINGLE)
    table |= np.uint32(WORDY)
    table[_ranges(_PUNCTUATION + " " + _STOPS + " " + _LINE_STOPS)] &= ~np.uint32(WORDY)
    mark(_ranges(_STOPS), STOP | TERMINAL)
    mark(_ranges(_LINE_STOPS), TERMINAL)
    mark(_ranges(_PUNCT_MARKS), PREFIX | SUFFIX | DOTTED)
    mark(_ranges(_QUOTE_MARKS), PREFIX | SUFFIX | QUOTE | DOTTED)
    mark(_ranges(_DASHES), PREFIX | SUFFIX)
    mark("§%=" + _CURRENCIES, PREFIX)
    mark(_CURRENCIES, CURRENCY)
    mark("0123456789", DIGIT | DOTTED)
    mark("%²-+|?:", DOTTED)
    mark([*_ranges(_DASHES), ord("-"), ord("~")], HYPHEN)
    table[table & ICON != 0] |= np.uint32(PREFIX | SUFFIX)
    table[table & LOWER != 0] |= np.uint32(DOTTED)
    table[table & (PREFIX | SUFFIX | CURRENCY | HYPHEN) != 0] |= np.uint32(COMPLEX)
    mark("+.,*^<>/:", COMPLEX)
    table[0xA1:0x10000] |= np.uint32(LABEL)
    mark([*range(48, 58), *range(65, 91), *range(97, 123)], LABEL)
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=1)
def lower() -> np.ndarray:
    """The lower case of every code point where that is one code point, else itself, (0x110000,), uint32."""
    table = np.arange(CODES, dtype=np.uint32)
    for code in range(_LAST):
        other = chr(code).lower()
        if len(other) == 1:
            table[code] = ord(other)
    table.flags.writeable = False
    return table
