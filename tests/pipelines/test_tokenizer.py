import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import storage
from pipelines.tokenizer import Tokenizer, TokenizerSettings, train_on_texts


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat on the mat. ", "a naïve café, 漢字 and 😀\n\n\tdef f(x): return x"] * 20
    return train_on_texts(iter(texts), TokenizerSettings(vocab_size=420, reserved_tokens=4))


def test_training_equals_a_hand_worked_example():
    # Counts of the words (Ġ is the space before a word): "low" 1, "Ġlow" 2, "Ġlower" 3, "Ġnew" 4.
    # Pairs: l-o and o-w 6 each, Ġ-l 5, w-e and e-r 3 each, Ġ-n, n-e and e-w 4 each. The tie at 6 goes to the pair of
    # the smaller ids, so l-o is merged first; then lo-w has 6; then Ġ-low 5; then e-w, n-e and Ġ-n tie at 4.
    text = "low low low lower lower lower new new new new"
    got = train_on_texts(iter([text]), TokenizerSettings(vocab_size=256 + 2 + 6, reserved_tokens=0, min_frequency=1))
    merges = [got.backend.id_to_token(i) for i in range(258, 264)]
    assert merges[:3] == ["lo", "low", "Ġlow"]
    assert set(merges[3:5]) < {"ew", "ne", "new", "Ġn", "Ġnew", "Ġne"}
    assert [got.backend.id_to_token(i) for i in got.encode("low low")] == ["low", "Ġlow"]


def test_special_tokens_come_first_and_are_text_in_a_document(tokenizer):
    assert (tokenizer.eot_id, tokenizer.pad_id) == (0, 1)
    assert tokenizer.backend.id_to_token(2) == "<|reserved_0|>"
    ids = tokenizer.encode("a <|endoftext|> in a document")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> in a document"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips_and_its_bytes_are_counted(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids) == text.encode()
    assert TOKENIZER.byte_lengths()[ids].sum() == len(text.encode())


TOKENIZER = train_on_texts(iter(["some text to merge, some more text"] * 4), TokenizerSettings(vocab_size=340))


def test_loading_gives_the_same_tokens(tokenizer, tmp_path):
    storage.write_bytes(str(tmp_path / "tokenizer.json"), tokenizer.backend.to_str().encode())
    loaded = Tokenizer.load(str(tmp_path))
    text = "the cat <|endoftext|> 漢字"
    assert loaded.encode(text) == tokenizer.encode(text) == loaded.encode_batch([text])[0]
    assert loaded.vocab_size == tokenizer.vocab_size


def test_errors_name_the_file_and_the_setting(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `ingot tokenizer` first"):
        Tokenizer.load(str(tmp_path))
    storage.write_bytes(str(tmp_path / "tokenizer.json"), b"{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer file"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer.vocab_size is 300; it has to be at least 320"):
        TokenizerSettings(vocab_size=300).validate()
