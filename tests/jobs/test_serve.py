"""`ingot serve`, by the official client: one server on the session's Ray, with a run put into a workspace by hand."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import serve, serve_api
from jobs.generate import text as generated
from jobs.run_folder import StoredRun
from jobs.serve_api import Api, ApiError, Limits, read_completion
from jobs.serve_engine import Batcher
from jobs.serve_text import Text
from jobs.settings import GenerateJob, ServeJob, SettingsError
from jobs.trained import load
from models.config import ModelConfig, OptimizerConfig
from models.generate import Sampling, Token
from models.optimizer import build_optimizer
from models.training import checkpoints
from models.training.ledger import LEDGER, Entry, Ledger
from models.transformer import Transformer
from pipelines import storage
from pipelines.tokenizer import TokenizerSettings, train_on_texts

KEY = "the-key-of-the-tests"
CORPUS = "The house is old, and the river is wide. Größe, café, 東京. 🙂 "
PROMPTS = [CORPUS[: 3 * i] for i in range(1, 17)]
SLOTS, WAITING, LONGEST = 4, 28, 32768


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("serve"))
    tokenizer = train_on_texts(iter([CORPUS * 20]), TokenizerSettings(vocab_size=300, reserved_tokens=2))
    storage.write_bytes(f"{folder}/tokenizer/tokenizer.json", tokenizer.backend.to_str().encode())
    storage.write_json(f"{folder}/tokenizer/manifest.json", {"fingerprint": "t"})
    config = ModelConfig(
        vocab_size=320, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=LONGEST,
        tied_embeddings=False,
    )  # fmt: skip
    run = StoredRun(f"{folder}/runs/base")
    run.write_json("run.json", {"model": asdict(config), "tokens_manifest": "of the tokens", "tokenizer": "t"})
    model = Transformer(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
        model.output.weight[tokenizer.eot_id] = 0  # so that texts go on
    checkpoints.save(run, "checkpoints/step-00000010", model, build_optimizer(model, OptimizerConfig()), {})
    ledger = Ledger()
    ledger.add(Entry(10, 10, 10, 1.0, "checkpoints/step-00000010", "clean"))
    run.write_json(LEDGER, ledger.to_dict())
    return folder


@pytest.fixture(scope="module")
def server(workspace, ray_session):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = ServeJob(
        workspace=workspace, port=port, slots=SLOTS, max_waiting=WAITING, max_request_bytes=100_000, device="cpu",
        cpus=0.5,
    )  # fmt: skip
    with serve.serving(asked, KEY) as url:
        yield url


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def greedy(workspace):
    """What `ingot generate` gives, greedily."""
    trained = load(GenerateJob(workspace=workspace), "cpu")

    def text(prompt, tokens):
        asked = GenerateJob(workspace=workspace, prompt=prompt, max_new_tokens=tokens, temperature=0.0)
        return "".join(generated(trained, asked))

    text.trained = trained
    return text


def greedily(client, prompt, tokens, **more):
    return client.completions.create(model="base", prompt=prompt, max_tokens=tokens, temperature=0.0, **more)


def streamed(stream):
    chunks = list(stream)
    return "".join(c.text for chunk in chunks for c in chunk.choices), chunks


def test_completes_and_streams_what_generate_does(client, greedy):
    expected = greedy("The house", 40)
    whole = greedily(client, "The house", 40)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.object, whole.model) == ("text_completion", "base")
    prompt = [greedy.trained.tokenizer.bos_id, *greedy.trained.tokenizer.encode("The house")]
    usage = {"prompt_tokens": len(prompt), "completion_tokens": 40, "total_tokens": len(prompt) + 40}
    assert {name: getattr(whole.usage, name) for name in usage} == usage

    text, chunks = streamed(greedily(client, "The house", 40, stream=True, stream_options={"include_usage": True}))
    assert text == expected
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == usage["total_tokens"]
    assert len({chunk.id for chunk in chunks}) == 1
    # token ids are taken as they are
    assert greedily(client, prompt, 40).choices[0].text == expected


def test_clients_at_the_same_time_get_each_their_own(client, greedy):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda p: streamed(greedily(client, p, 24, stream=True))[0], PROMPTS))
    assert answers == [greedy(prompt, 24) for prompt in PROMPTS]


def test_several_prompts_and_choices(client, greedy):
    answer = greedily(client, PROMPTS[:3], 8, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [greedy(p, 8) for p in PROMPTS[:3] for _ in range(2)]

    def drawn(seed):
        answer = client.completions.create(model="base", prompt="The", max_tokens=24, seed=seed, n=3)
        return [choice.text for choice in answer.choices]

    assert len(set(drawn(5))) == 3  # each choice is a draw of its own
    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client, greedy, stream):
    text = greedy("The river", 48)
    for at, length in ((7, 1), (10, 4), (21, 9)):
        stop = text[at : at + length]
        expected = text[: text.find(stop)]
        answer = greedily(client, "The river", 48, stop=[stop, "never there"], stream=stream)
        if stream:
            got, chunks = streamed(answer)
            choice = chunks[-1].choices[0]
        else:
            choice = answer.choices[0]
            got = choice.text
        assert (got, choice.finish_reason) == (expected, "stop")


def test_log_probabilities_are_the_models(client, greedy):
    tokenizer, model = greedy.trained.tokenizer, greedy.trained.model
    prompt = tokenizer.encode("The house is old")
    answer = greedily(client, prompt, 6, logprobs=3, echo=True).choices[0]
    told = answer.logprobs
    assert answer.text == "".join(["The house is old", *told.tokens[len(prompt) :]]) or "bytes:" in str(told.tokens)
    with torch.no_grad():
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
        scores = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].log_softmax(-1)
    expected = [float(scores[i, token]) for i, token in enumerate(ids[1:])]
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert told.top_logprobs[0] is None
    for i, top in enumerate(told.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(scores[i].max()), abs=1e-4)
    assert told.text_offset[: len(prompt)] == [len(tokenizer.decode(prompt[:i])) for i in range(len(prompt))]
    scored = greedily(client, prompt, 0, logprobs=1, echo=True)  # a prompt's score alone
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected[: len(prompt) - 1], abs=1e-4)
    assert scored.usage.completion_tokens == 0


def test_a_stream_that_is_left_frees_its_slot(client, server):
    streams = [greedily(client, f"Text {i}", LONGEST // 2, stream=True) for i in range(SLOTS)]
    for stream in streams:
        next(iter(stream))
    assert health(server)["active"] == SLOTS
    for stream in streams:
        stream.close()
    assert greedily(client, "The", 4).choices[0].finish_reason == "length"
    deadline = time.monotonic() + 60
    while health(server)["active"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert health(server)["active"] == 0


def health(server):
    with urllib.request.urlopen(f"{server}/health") as answer:
        return json.load(answer)


def test_errors_are_openais(client, server):
    with pytest.raises(openai.AuthenticationError, match="key") as caught:
        openai.OpenAI(base_url=f"{server}/v1", api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server}/v1/models")
    assert [model.id for model in client.models.list()] == ["base"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-3", prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="base", messages=[])
    with pytest.raises(openai.BadRequestError, match="32768") as caught:
        greedily(client, "The house", LONGEST)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="token ids have to be from 0 to"):
        greedily(client, [999999], 4)
    with pytest.raises(openai.RateLimitError, match="too many requests wait"):
        greedily(client, "The", 4, n=SLOTS + WAITING + 1)
    with pytest.raises(openai.APIStatusError, match="100000 bytes") as caught:
        greedily(client, "x" * 200_000, 4)
    assert caught.value.status_code == 413


def test_the_page_needs_no_key_and_nothing_from_elsewhere(server):
    with urllib.request.urlopen(server) as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "Continue a text" in page
    assert "http" not in page
    assert policy.startswith("default-src 'none'")


def test_it_refuses_to_start_without_a_key_or_a_port(workspace, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(SettingsError, match="NO_SUCH_KEY"):
        serve.run(ServeJob(workspace=workspace, api_key_env="NO_SUCH_KEY"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port is {port}"):
            serve.run(ServeJob(workspace=workspace, port=port))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "half a pair \ud800"}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 101}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
    ],
)
def test_what_a_request_may_not_say(fields, param):
    with pytest.raises(ApiError) as caught:
        read_completion(json.dumps(fields).encode(), "base", Limits(100, 8, 8, 1000))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_request(body):
    with pytest.raises(ApiError, match="JSON"):
        read_completion(body, "base", Limits(100, 8, 8, 1000))


class OneToken:
    """An engine that counts what it is asked, and fails when told to."""

    slots, waiting, length = 1, 0, 8

    def __init__(self):
        self.texts, self.number, self.fails = [], 0, False

    @property
    def active(self):
        return len(self.texts)

    @property
    def busy(self):
        return bool(self.texts)

    def submit(self, prompt, sampling):
        self.number += 1
        self.texts.append(self.number)
        return self.number

    def cancel(self, number):
        self.texts.remove(number)

    def step(self):
        time.sleep(0.001)
        if self.fails:
            raise ValueError("out of memory")
        return [Token(number, 65, -1.0) for number in self.texts]


def test_texts_are_given_up_with_whoever_waits_for_them():
    engine = OneToken()
    batcher = Batcher(engine)

    async def leave():
        async with batcher.ask([([1], Sampling(8)), ([2], Sampling(8))]) as asking:
            async for batch in asking.tokens():
                assert {index for index, _ in batch} == {0, 1}
                assert batcher.open == 2
                break
        task = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        await batcher.call(lambda: None)  # everything before it is done

    async def wait():
        async with batcher.ask([([3], Sampling(8))]) as asking:
            async for _ in asking.tokens():
                pass

    asyncio.run(leave())
    assert (batcher.open, engine.active, engine.number) == (0, 0, 3)
    batcher.close()


def test_a_model_that_fails_is_told_to_all_and_to_ray():
    engine = OneToken()
    batcher = Batcher(engine)

    async def ask():
        async with batcher.ask([([1], Sampling(8))]) as asking:
            async for _ in asking.tokens():
                engine.fails = True

    for _ in range(2):  # who waits, and who comes later
        with pytest.raises(RuntimeError, match="the model failed"):
            asyncio.run(ask())
    replica = serve.Replica.__new__(serve.Replica)
    replica.batcher = batcher
    with pytest.raises(ValueError, match="out of memory"):
        replica.check_health()


def test_who_asks_while_the_model_fails_is_told_too():
    engine = OneToken()
    batcher = Batcher(engine)
    engine.fails = True

    async def together():
        async def ask(number):
            async with batcher.ask([([number], Sampling(8))]) as asking:
                async for _ in asking.tokens():
                    pass

        stalled = threading.Event()
        first = asyncio.create_task(batcher.call(stalled.wait))
        asked = [asyncio.create_task(ask(number)) for number in range(3)]
        await asyncio.sleep(0.05)
        batcher._commands.put(lambda: 1 / 0)  # what comes after it is never read
        late = [asyncio.create_task(ask(number)) for number in range(3)]
        late.append(asyncio.create_task(batcher.call(lambda: None)))
        await asyncio.sleep(0.05)
        stalled.set()
        return await asyncio.wait_for(asyncio.gather(first, *asked, *late, return_exceptions=True), 20)

    first, *others = asyncio.run(together())
    assert first is True
    assert [str(error) for error in others] == ["the model failed"] * 7
    assert (batcher.open, batcher._waiters) == (0, set())


def test_prompts_that_are_scored_count_as_waiting(monkeypatch):
    stalled, engine = threading.Event(), OneToken()
    monkeypatch.setattr(serve_api, "prompt_scores", lambda *_: stalled.wait() and [])
    batcher, tokenizer = Batcher(engine), SimpleNamespace(vocab_size=9, bos_id=0, eot_id=0, token_bytes=lambda _: b"a")
    trained = SimpleNamespace(name="base", tokenizer=tokenizer, ends=frozenset({0}), model=None)
    api = Api(trained, batcher, b"", Limits(max_tokens=4, max_texts=8, max_waiting=2, max_bytes=100))
    body = b'{"prompt": [[1], [2]], "max_tokens": 0, "echo": true, "logprobs": 1}'

    async def ask():
        return await api._complete(read_completion(body, "base", api.limits))

    async def together():
        first = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as caught:  # two wait, one slot and two places are there
            await ask()
        stalled.set()
        return caught.value.status, await asyncio.wait_for(first, 20)

    status, answer = asyncio.run(together())
    assert (status, answer.status_code, batcher.open) == (429, 200, 0)
    batcher.close()


@pytest.mark.parametrize(
    ("host", "opened"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("a-machine", "http://a-machine:80"),
    ],
)
def test_the_address_that_is_told_can_be_opened(host, opened):
    assert serve.address(host, 80) == opened


TOKENS = [b"\xe6", b"\x9d\xb1", b"\xe4\xba\xac", b"a", b"b", b"ab", b" a", b"\xf0\x9f", b"\x99\x82", b"\xff"]


@given(
    tokens=st.lists(st.integers(0, len(TOKENS) - 1), max_size=30),
    stop=st.lists(st.text("ab 東🙂", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_comes_whole_and_ends_before_the_first_stop_string(tokens, stop):
    """Whatever the tokens cut apart: the pieces add up to the text, and none shows what is taken back later."""
    text, pieces, seen = Text(TOKENS.__getitem__, str, stop, offset=5), [], []
    for token in [*tokens, None]:
        piece = text.add(token, finished="length" if token is None else None)
        pieces.append(piece.text)
        seen += piece.tokens
        if piece.finish_reason:
            break
    whole = b"".join(TOKENS[t] for t in tokens).decode("utf-8", "replace")
    # of several stop strings that which is whole first ends the text
    ends = [whole.find(s) + len(s) for s in stop if s in whole]
    begins = [whole.find(s) for s in stop if s in whole]
    got = "".join(pieces)
    assert got == whole[: len(got)]
    if not ends:
        assert (got, text.finish_reason) == (whole, "length")
    else:
        assert text.finish_reason == "stop"
        assert min(begins) <= len(got) < min(ends)
        assert not any(s in got for s in stop)
    assert [t.offset for t in seen] == sorted(t.offset for t in seen)
    assert [t.text for t in seen] == [str(t) for t in tokens[: len(seen)]]
    assert all(5 <= t.offset <= 5 + len(got) for t in seen)
    assert ends or len(seen) == len(tokens)


def test_the_token_that_ends_a_text_is_told_without_a_character():
    text = Text(TOKENS.__getitem__, {3: "a", 9: "<end>"}.__getitem__, ["ab"], end=9)
    assert text.add(3, -1.0).text == ""  # could become "ab"
    piece = text.add(None, -2.0, [(9, -2.0), (3, -3.0)], "stop")
    assert (piece.text, piece.finish_reason) == ("a", "stop")
    assert [(t.text, t.log_probability, t.offset) for t in piece.tokens] == [("a", -1.0, 0), ("<end>", -2.0, 1)]
    assert piece.tokens[1].top == {"<end>": -2.0, "a": -3.0}
