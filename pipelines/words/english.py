"""English words that are cut otherwise than their characters say, as spaCy's English tokenizer cuts them.

Contractions (``can't`` is ``ca`` and ``n't``), abbreviations that keep their full stop, times of day, emoticons.
"""

# ruff: noqa: RUF001 - Cyrillic units look like Latin ones

from __future__ import annotations

import itertools

_ABBREVIATIONS = (
    "Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. "
    "Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. "
    "S.C. Sep. Sept. Tenn. Va. Wash. Wis. Mt. a.m. p.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. "
    "i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. "
    "a. b. c. d. e. f. g. h. i. j. k. l. m. n. o. p. q. r. s. t. u. v. w. x. y. z. ä. ö. ü."
)
_WHOLE = (
    "' '' \\\") \\t \\n — <space> C++ and/or w/o 's 'S \u2018s \u2018S 're 'd 'em em 'll ll 'nuff nuff 'cause 'Cause "
    "'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock O'clock "
    "doin goin nothin nuthin ol somethin lovin havin Doin Goin Nothin Nuthin Ol Somethin Lovin Havin "
    "doin' goin' nothin' nuthin' ol' somethin' lovin' havin' "
    "Doin' Goin' Nothin' Nuthin' Ol' Somethin' Lovin' Havin'"
)
_PIECES = (
    "y'|all y|all how|'d|'y How|'d|'y not|'ve not|ve Not|'ve Not|ve can|not Can|not gon|na Gon|na got|ta Got|ta "
    "let|'s Let|'s c'm|on C'm|on °|c|. °|f|. °|k|. °|C|. °|F|. °|K|."
)
_EMOTICONS = (
    ":) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :( :-( :(( "
    ":-(( :((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 "
    ":() >:o :* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D ^_^ ^__^ ^___^ >.< >.> <.< "
    "._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o 0.0 o.0 0.o @_@ <3 <33 <333 </3 "
    "(^_^) (-_-) (._.) (>_<) (*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\\(ツ)/¯ (╯°□°）╯︵┻━┻ ><(((*>"
)
_NO_CONTRACTION = "Ill ill Its its Hell hell Shell shell Shed shed were Were Well well Whore whore"
"""Words of their own that look like a contraction without its apostrophe."""

_UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa "
    "mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч "
    "кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ كم² كم³ م م² م³ سم سم² سم³ مم مم² مم³ كم غرام جرام جم كغ ملغ كوب "
    "اكواب"
)
UNITS = tuple(_UNITS.split())
"""Units that come off the digits before them."""


def exceptions() -> dict[str, tuple[str, ...]]:
    """The pieces of each such word."""
    found: dict[str, tuple[str, ...]] = {}

    def contract(words: str, *endings: str) -> None:
        """Words, also with a capital, with each ending; its parts follow apostrophes, which may all be left out."""
        for word, ending in itertools.product(words.split(), endings):
            for head, mark in itertools.product((word, word.title()), ("'", "")):
                found[head + mark + ending.replace("'", mark)] = (head, *(mark + part for part in ending.split("'")))

    def negate(words: str, *endings: str) -> None:
        for word, ending in itertools.product(words.split(), endings):
            for head, mark in itertools.product((word, word.title()), ("'", "")):
                parts = ["n" + mark + "t", *(mark + part for part in ending.split("'") if part)]
                found[head + "".join(parts)] = (head, *parts)

    contract("i you he she it we they", "ll", "ll've", "d", "d've")
    contract("i", "m")
    for head, mark in itertools.product("iI", ("'", "")):
        found[f"{head}{mark}ma"] = (head, f"{mark}m", "a")
    contract("i you we they", "ve")
    contract("you we they", "re")
    contract("he she it", "s")
    contract("who what when where why how there that this these those", "ll", "ll've", "d", "d've")
    contract("who what when where why how there that this", "s")
    contract("who what when where why how there these those", "re", "ve")
    negate("ca could do does did had may might must need ought sha should wo would", "", "ve")
    contract("could might must should would", "ve")
    negate("ai are is was were have has dare", "")
    for hour, half in itertools.product(range(1, 13), ("a.m.", "am", "p.m.", "pm")):
        found[f"{hour}{half}"] = (str(hour), half)
    for word in _NO_CONTRACTION.split():
        found.pop(word, None)
    for word in f"{_ABBREVIATIONS} {_WHOLE} {_EMOTICONS}".split():
        found[word] = (word,)
    for word in _PIECES.split():
        found[word.replace("|", "")] = tuple(word.split("|"))
    found[":|"] = (":|",)
    curly = {word.replace("'", "\u2019"): tuple(p.replace("'", "\u2019") for p in found[word]) for word in found}
    return curly | found
