"""Text of any origin: encodings are detected, damage is named, nothing is replaced by marks."""

import contextlib

import charset_normalizer
import numpy as np
import pytest

from imagen_jax.data.sources import captions
from imagen_jax.io import encodings, text

FRENCH = ["un garçon mange une crêpe", "l’été à la plage", "ÉTÉ À PARIS, un café"]
TEXTS = {
    "cp1252": [*FRENCH, "ein großer Bär", "¿Dónde está?", "50€", "it’s", "25°C", "São Paulo"],
    "cp1251": ["красный круг на синем фоне", "КРАСНЫЙ КРУГ", "фото iPhone, кошка на окне"],
    "koi8_r": ["красный круг на синем фоне", "кошка сидит на окне"],
    "cp932": [
        "赤い丸と青い四角",
        "猫が窓に座っている",
        "Tシャツを着た猫のphoto",
        "iPhoneで撮った写真",
    ],
    "euc_jp": ["赤い丸と青い四角", "猫が窓に座っている"],
    "gb18030": ["一只红色的猫坐在窗户上", "蓝色的狗在公园里跑", "穿T恤的猫,3D渲染"],
    "big5": ["一隻紅色的貓坐在窗戶上", "藍色的狗在公園裡跑"],
    "cp949": ["빨간 고양이가 창가에 앉아 있다", "3D렌더링 고양이 사진"],
    "cp1250": ["czerwony okrąg na niebieskim tle, źdźbło", "żółty rower przy ścianie"],
    "cp1253": ["κόκκινος κύκλος σε μπλε φόντο"],
    "cp1254": ["kırmızı daire, mavi kare, şişe ve ağaç"],
    "cp1255": ["עיגול אדום על רקע כחול", "חתול יושב ליד החלון"],
    "cp1256": ["دائرة حمراء على خلفية زرقاء", "قطة تجلس على النافذة"],
    "cp874": ["วงกลมสีแดงบนพื้นหลังสีน้ำเงิน"],
    "mac_roman": ["a café, the owner’s table"],
}


def decoded(pairs):
    data = [written.encode(name) for name, written in pairs]
    names = [guess.name for guess in encodings.detect(data)]
    return [one.decode(name) for one, name in zip(data, names, strict=True) if name]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_one_encoding(name):
    assert decoded([(name, written) for written in TEXTS[name]]) == TEXTS[name]


@pytest.mark.parametrize("name", ["cp1252", "cp1251", "cp932", "gb18030", "cp1256"])
def test_one_text_alone(name):
    known = {"ÉTÉ À PARIS, un café"} if name == "cp1252" else set()
    for written in set(TEXTS[name]) - known:
        assert decoded([(name, written)]) == [written]


@pytest.mark.parametrize(
    "names", [("cp1252", "cp1251"), ("cp1252", "cp932"), ("cp1251", "cp932"), ("cp1252", "cp949")]
)
def test_texts_of_several_encodings(names):
    pairs = [(name, written) for name in names for written in TEXTS[name]]
    assert decoded(pairs) == [written for _, written in pairs]


SHORT = "été Ñu mûr là où Öl Bär Tür Kuß gås får ø æg pão mãe sí té más più é à Ñ né Âge œuf"


def test_a_short_word_alone():
    for written in SHORT.split():
        assert decoded([("cp1252", written)]) == [written]
    for written in ("кот", "лес", "мяч", "нос"):
        assert decoded([("cp1251", written)]) == [written]


def test_short_words_beside_others():
    """A word of one or two letters is in the encoding of the other texts."""
    for name, words in (
        ("cp1252", [*SHORT.split(), "çà"]),
        ("cp1251", ["кот", "дом", "лес", "мяч", "да", "я", "нос"]),
        ("cp932", ["猫", "犬", "山", "赤い", "いぬ"]),
        ("gb18030", ["猫", "狗", "山", "红花"]),
    ):
        assert decoded([(name, word) for word in words]) == words
        beside = [*words[:2], *TEXTS[name]]
        assert decoded([(name, written) for written in beside]) == beside


NAMES = {
    "cp1250": [
        "Węgry Włochy Łotwa Norwegia Gruzja-Północna Książę Świnoujście Indie-Wschodnie Źródło Ćma",
        "Česko Německo Řecko Švédsko Dánsko Ukrajina-Východní Švýcarsko Keňa Maďarsko Černá-Hora",
        "Slovenija Češka Švica Žalec Nemčija Španija Avstrijska Turčija Grčija Južna-Koreja",
        "România Franţa Elveţia Suedia Turcia-Mică Bucureşti Moscovă Braşov Austria-Ungară Viena",
    ],
    "cp1254": ["Türkiye Fransa İngiltere Mısır Güneydoğu Kıbrıs Gürcistan Kırgızistan Işık Çeşme"],
    "cp1257": [
        "Lietuva Prancūzija Šveicarija Rūsys Žemė Ąžuolas Įlanka Ežeras Vyšnios Ūkis",
        "Latvija Francija Šveice Somija Rīga Jūrmala Ļeņingrada Ēģipte Čehija",
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_languages_in_latin_letters(name):
    """Most of their letters are those of Windows-1252, where ł is ³ and ğ is ð."""
    for names in NAMES[name]:
        written = [word for word in names.split() if not word.isascii()]
        assert decoded([(name, word) for word in written]) == written
        beside = [(name, word) for word in written] + [("cp1251", "красный круг на синем фоне")]
        assert decoded(beside) == [word for _, word in beside]


WORDS = {
    "cp1250": "Keňa koń dům łoś žába",
    "cp1251": "да дом я кот нос",
    "cp1252": "été crème Öl là",
    "cp1253": "γη φως νερό",
    "cp1254": "ılık kuş",
    "cp1255": "דג עץ",
    "cp1256": "قط يد",
    "cp932": "猫 犬 山",
    "gb18030": "狗 山 红花",
    "cp949": "개 꽃 나무",
    "cp874": "บี หมา",
}


@pytest.mark.parametrize("name", WORDS)
def test_what_a_word_leaves_open_is_said(name):
    """A word alone may be read wrongly, but not in silence; many words are certain."""
    for word in WORDS[name].split():
        (guess,) = encodings.detect([word.encode(name)])
        right = guess.name and word.encode(name).decode(guess.name) == word
        assert right or not guess.name or guess.other, word
    assert encodings.detect([b"\xe4\xe0"])[0].other  # "да", or "äà".
    beside = [word.encode("cp1252") for word in FRENCH] + ["да".encode("cp1251")]
    assert [bool(guess.other) for guess in encodings.detect(beside)] == [False] * 3 + [True]
    if name in TEXTS:
        texts = [written.encode(name) for written in TEXTS[name] if len(written) > 20]
        assert not any(guess.other for guess in encodings.detect(texts))


REPEATED = {
    "cp1257": "kroatų persų tulų gotų zulų urdų romų estų kinų ainų",  # As Danish, "kroatø".
    "cp1252": " ".join(f"são{number}" for number in range(40)),  # As Romanian, "săo".
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("count", [2, 3, 5, 10, 40])
def test_one_letter_again_and_again_is_no_further_evidence(name, count):
    texts = REPEATED[name].split()[:count]
    for guess, word in zip(encodings.detect([t.encode(name) for t in texts]), texts, strict=True):
        assert guess.other or word.encode(name).decode(guess.name) == word
    certain = encodings.detect([word.encode("cp1252") for word in ["café", "cafés"] * count])
    assert set(certain) == {encodings.Guess("cp1252")}


ESTONIAN = "tšuvaši šani vašo šona šoti baškiiri tšuugi tšuangi fidži tšokto tšerokii"


@pytest.mark.parametrize("count", [1, 2, 3, 5, 11])
def test_estonian_names_are_right_or_uncertain(count):
    """Their š is the ð of Icelandic in Windows-1252."""
    texts = ESTONIAN.split()[-count:]
    for guess, word in zip(
        encodings.detect([t.encode("cp1257") for t in texts]), texts, strict=True
    ):
        assert guess.other or word.encode("cp1257").decode(guess.name) == word


def test_a_later_text_in_another_encoding_is_uncertain():
    """The first texts of a folder are Russian; one after them is French."""
    guesses = encodings.detect([written.encode("cp1251") for written in TEXTS["cp1251"]])
    voilà = "voilà".encode("cp1252")  # In cp1251, its last letter is the Russian "а".
    assert encodings.nearest(voilà, guesses) == encodings.Guess("cp1251", "cp1252")
    assert encodings.nearest("кот".encode("cp1251"), guesses) == encodings.Guess("cp1251")


def test_the_library_alone_misreads_texts_of_one_encoding():
    """Why there are letters.py and encodings.py: once this fails, charset-normalizer may do."""
    wrong = set()
    for name, written in TEXTS.items():
        data = "\n".join(written).encode(name)
        best = charset_normalizer.from_bytes(data, cp_isolation=list(encodings.LANGUAGES)).best()
        if best is None or data.decode(best.encoding, "replace") != "\n".join(written):
            wrong.add(name)
    assert {"cp1252", "cp1250", "cp1253", "cp1254", "euc_jp"} <= wrong


def test_bytes_of_no_text():
    assert encodings.detect([b"\x81\x8d\x8f\x90\x9d\xff\xfe\x00\x01"]) == [encodings.Guess("")]
    assert encodings.detect([]) == []


UNICODE = "a café with 🐱 and кот — “zwei”"


@pytest.mark.parametrize(
    "data",
    [
        UNICODE.encode(),
        UNICODE.encode("utf-8-sig"),
        UNICODE.encode("utf-16"),
        b"\xfe\xff" + UNICODE.encode("utf-16-be"),
        UNICODE.encode("utf-32"),
        b"\0\0\xfe\xff" + UNICODE.encode("utf-32-be"),
        ("\ufeff" + UNICODE).encode("utf-8-sig"),
        UNICODE.encode("utf-16-le", "surrogatepass").decode("utf-16-le").encode(),
        "".join(
            chr(0xD800 + (ord(c) - 0x10000 >> 10)) + chr(0xDC00 + (ord(c) & 0x3FF))
            if ord(c) > 0xFFFF
            else c
            for c in UNICODE
        ).encode("utf-8", "surrogatepass"),
    ],
)
def test_unicode(data):
    assert text.decode(data) == UNICODE
    assert text.fault(UNICODE) == ""


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("written", ["a red circle", "красный круг", "κόκκινος", "שלום עולם"])
def test_utf16_without_a_mark(name, written):
    assert text.decode(written.encode(name)) == written


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("красный круг".encode()[:-1], "damaged UTF-8 (at byte 21)"),
        ("a café, à la".encode() + b"\xff", "damaged UTF-8"),
        ("\ufeffa circle".encode("utf-16-le")[:-1], "damaged UTF-16"),
        ("\ufeffa circle".encode("utf-32-le")[:-1], "damaged UTF-32"),
    ],
)
def test_damage_is_named(data, says):
    with pytest.raises(text.TextError) as error:
        text.decode(data)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a\0b", "a NUL character"),
        (b"half \xed\xa0\xbd", "an unpaired surrogate (U+D83D at character 5)"),
        (b"\xff\xfea\0\x00\xde", "an unpaired surrogate (U+DE00 at character 1)"),
        (b"\xfe\xff\0a\xd8\x3d", "an unpaired surrogate"),
    ],
)
def test_texts_that_cannot_be_used(data, says):
    assert text.fault(str(text.decode(data))).startswith(says)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["utf-8-sig", "utf-16", "cp1252"])
def test_tables(tmp_path, delimiter, end, name):
    rows = [["File_Name ", "Text"], ["a.jpg", "crêpe; à, la"], ["b.jpg", 'a "b"\nc']]
    lines = [delimiter.join('"' + c.replace('"', '""') + '"' for c in row) for row in rows]
    (tmp_path / "t.csv").write_bytes(end.join([*lines, ""]).encode(name))
    found = [row.fields for row in text.read_csv(tmp_path / "t.csv")]
    assert found == [dict(zip(("file_name", "text"), row, strict=True)) for row in rows[1:]]


def test_mutated_texts_and_tables_end_in_text_or_its_own_error(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"]
    for number in range(400):
        data = bytearray(UNICODE[: rng.integers(2, 31)].encode(kinds[number % len(kinds)]))
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "t.csv").write_bytes(b'file_name,text\na.jpg,"' + bytes(data) + b'"\n')
        with contextlib.suppress(text.TextError):
            list(text.read_csv(tmp_path / "t.csv"))
        with contextlib.suppress(text.TextError):
            captions.of_file(bytes(data), by_line=bool(number % 2))
            found = text.decode(bytes(data))
            if isinstance(found, str):
                text.fault(found)
            elif name := encodings.detect([found])[0].name:
                assert found.decode(name)
