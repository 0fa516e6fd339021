import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from pipelines import storage
from pipelines.documents import document_id, to_table
from pipelines.pretokens import pre_tokenizer
from pipelines.stage import Output, Stage, Unit, run_stage
from pipelines.tokenizer import Tokenizer, TokenizerSettings, byte_chars, train, train_on_texts


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


def theirs(texts, chosen):
    """The same training by the ``tokenizers`` package."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer(chosen.pre_tokenizer, chosen.digits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=chosen.vocab_size,
        min_frequency=chosen.min_frequency,
        special_tokens=chosen.all_special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


WORDS = st.lists(
    st.sampled_from(["a", "aa", "ab", "ba", "aab", "the", "then", "hen", "é", "漢字", "12345", "...", "=="])
)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(WORDS.map(" ".join) | WORDS.map("".join) | st.text(alphabet="ab \n's1"), min_size=1, max_size=6),
    kind=st.sampled_from(["gpt2", "gpt4"]),
    digits=st.integers(1, 3),
    min_frequency=st.integers(0, 3),
)
def test_the_trainer_of_tokenizers_makes_the_same_file_of_the_same_text(texts, kind, digits, min_frequency):
    # Few different letters, so that most steps choose among pairs of the same count.
    chosen = TokenizerSettings(
        vocab_size=256 + 4 + 60, reserved_tokens=1, special_tokens=["<|user|>"], pre_tokenizer=kind, digits=digits,
        min_frequency=min_frequency,
    )  # fmt: skip
    assert train_on_texts(texts, chosen).backend.to_str() == theirs(texts, chosen).to_str()


def test_training_equals_the_library_on_longer_text():
    rng = np.random.default_rng(0)
    parts = ["in", "ter", "nation", "al", "iz", "ation", "s", "un", "der", "stand", "ing", "ly", "café", "—", "0", "17"]
    texts = [" ".join("".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(400)) for _ in range(20)]
    chosen = TokenizerSettings(vocab_size=1200, reserved_tokens=0)
    assert train_on_texts(texts, chosen).backend.to_str() == theirs(texts, chosen).to_str()


@settings(max_examples=200, deadline=None)
@given(
    st.text()
    | st.lists(st.sampled_from(["<|endoftext|>", "<|pad|>", "\x00", "\x1c", "\ufffd", " ", "some"])).map("".join)
)
def test_any_text_round_trips_and_its_bytes_are_counted(text):
    for tokenizer in TOKENIZERS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
        assert not {tokenizer.eot_id, tokenizer.pad_id} & set(ids)
        both, starts = tokenizer.encode_batch([text, text])
        assert both.tolist() == [*ids, *ids]
        assert starts.tolist() == [0, len(ids), 2 * len(ids)]


@given(st.binary())
def test_every_byte_has_a_token(data):
    tokenizer = TOKENIZERS[0]
    ids = [tokenizer.backend.token_to_id(byte_chars()[byte]) for byte in data]
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")


TOKENIZERS = [
    train_on_texts(["some text to merge, some more text, 1234 and 56"] * 4, TokenizerSettings(vocab_size=340, **chosen))
    for chosen in ({}, {"pre_tokenizer": "gpt2"}, {"digits": 1})
]


def test_numbers_are_cut_as_the_settings_say():
    def cut(**chosen):
        tokenizer = train_on_texts(["1234567"] * 9, TokenizerSettings(vocab_size=330, min_frequency=1, **chosen))
        return [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("1234567")]

    assert cut(digits=3) == ["123", "456", "7"]
    assert cut(digits=1) == list("1234567")
    assert cut(pre_tokenizer="gpt2") == ["1234567"]


def rows():
    rng = np.random.default_rng(5)
    words = ["ore", "slag", "ingot", "furnace", "cast", "mould", "alloy", "10", "200", "x=1;"]
    for i in range(60):
        text = " ".join(rng.choice(words, rng.integers(1, 60)))
        yield {"id": document_id("books", "b", i), "text": text, "source": "books"}


def some_rows(numbers: list[int]):
    kept = to_table([row for i, row in enumerate(rows()) if i in numbers])
    yield Output(kept, None, kept.num_rows, 0)


def test_the_tokenizer_is_the_same_however_the_corpus_is_cut(tmp_path, ray_session):
    trained = []
    size = sum(len(row["text"]) for row in rows())
    for n_parts in (1, 3):
        units = [Unit(f"part-{i}", {"numbers": list(range(i, 60, n_parts))}) for i in range(n_parts)]
        corpus = f"{tmp_path}/corpus-{n_parts}"
        manifest = run_stage(Stage("near", corpus, {}, {}), units, some_rows)
        folder = f"{tmp_path}/tokenizer-{n_parts}"
        chosen = TokenizerSettings(vocab_size=320, reserved_tokens=0, sample_bytes=size // 2)
        facts = train(folder, corpus, manifest, chosen)
        assert 0.3 * size < facts["sample"]["bytes"] < 0.7 * size
        trained.append((storage.read_bytes(f"{folder}/tokenizer.json"), facts["sample"], facts["bytes_per_token"]))
        assert {storage.file_name(f.uri) for f in storage.list_files(folder)} == {"tokenizer.json", "manifest.json"}
    assert trained[0] == trained[1]
    tokenizer = Tokenizer.load(f"{tmp_path}/tokenizer-3")
    whole = train_on_texts([row["text"] for row in rows()], TokenizerSettings(vocab_size=320, reserved_tokens=0))
    tokens = sum(len(tokenizer.encode(row["text"])) for row in rows())
    assert size / tokens == pytest.approx(trained[0][2], rel=0.1)
    assert whole.vocab_size == tokenizer.vocab_size
    tiny = TokenizerSettings(vocab_size=320, reserved_tokens=0, sample_bytes=1)
    with pytest.raises(ValueError, match="sample_bytes is 1: so little that the sample holds no document"):
        train(f"{tmp_path}/tiny", corpus, manifest, tiny)


def test_loading_gives_the_same_tokens(tokenizer, tmp_path):
    storage.write_bytes(str(tmp_path / "tokenizer.json"), tokenizer.backend.to_str().encode())
    loaded = Tokenizer.load(str(tmp_path))
    text = "the cat <|endoftext|> 漢字"
    assert loaded.encode(text) == tokenizer.encode(text) == loaded.encode_batch([text])[0].tolist()
    assert loaded.vocab_size == tokenizer.vocab_size


def test_errors_name_the_file_and_the_setting(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `ingot tokenizer` first"):
        Tokenizer.load(str(tmp_path))
    storage.write_bytes(str(tmp_path / "tokenizer.json"), b"{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer file"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer.vocab_size is 300; it has to be at least 320"):
        TokenizerSettings(vocab_size=300).validate()
    with pytest.raises(ValueError, match="tokenizer.digits is 4; it has to be 1, 2 or 3"):
        TokenizerSettings(digits=4).validate()
    with pytest.raises(ValueError, match=r"tokenizer.special_tokens: <\|pad\|> is there twice"):
        TokenizerSettings(special_tokens=["<|user|>", "<|pad|>"]).validate()
    with pytest.raises(ValueError, match="tokenizer.special_tokens: 'x' is too short"):
        TokenizerSettings(special_tokens=["x"]).validate()


def test_a_library_that_encodes_otherwise_is_found_out(tokenizer):
    other = Tokenizer(tokenizer.backend)
    other.check_batch(["the cat sat", ""])
    other._bulk = TOKENIZERS[0]._bulk
    with pytest.raises(RuntimeError, match="give different ids for the text 'the cat sat'"):
        other.check_batch(["the cat sat"])
