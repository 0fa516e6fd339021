"""Log-likelihoods from packed trees of requests against transformers, one whole sequence at a time."""

from dataclasses import replace

import pytest
import torch
import transformers

from models import scoring
from models.config import ModelConfig
from models.hugging_face import save_pretrained
from models.parallel import parallelize
from models.scoring import Scorer
from models.transformer import Transformer

SMALL = ModelConfig(vocab_size=97, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=80, max_seq_len=220)


def with_large_weights(config):
    """A model whose likeliest token changes along a text."""
    model = Transformer(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def requests():
    """Questions behind two sets of examples, their answers of one token and of several, and what shares nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randint(0, 97, (n,), generator=generator).tolist()

    first, second, made = draw(60), draw(40), []
    for i in range(8):
        question, choice = draw(20 + i), draw(18)
        made += [(first + question, draw(1)) for _ in range(4)]
        made += [(first + question, choice + draw(1 + n)) for n in range(4)]
        made += [(second + question, choice[:10] + draw(1 + n)) for n in range(3)]
    made += [(first, draw(1)), (first[:30], first[30:]), (first[:1], draw(219)), (draw(3), draw(2)), made[0]]
    return made


def reference(model, asked):
    results = []
    for context, continuation in asked:
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation]])).logits[0, -len(continuation) - 1 : -1]
        values = logits.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        results.append((values.sum().item(), logits.argmax(-1).tolist() == continuation))
    return results


def scores(model, asked, tokens):
    found = {
        i: (value, likeliest) for i, value, likeliest in Scorer(model).log_likelihoods(asked, tokens_per_batch=tokens)
    }
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_log_likelihoods_and_greedy_flags_equal_those_of_transformers(tmp_path, n_kv_heads):
    model = with_large_weights(replace(SMALL, n_kv_heads=n_kv_heads, qk_norm=n_kv_heads == 2, base_width=32))
    save_pretrained(model.state_dict(), model.config, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32).eval()
    asked = requests()
    for context, _ in asked[:3]:  # random ones are never the likeliest
        more = theirs.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)[0, len(context) :].tolist()
        asked += [(context, more[:1]), (context, more)]
    expected = reference(theirs, asked)
    assert sum(likeliest for _, likeliest in expected) >= 6
    for tokens in (1, 300, 10**6):
        found = scores(model, asked, tokens)
        assert [flag for _, flag in found] == [flag for _, flag in expected]
        torch.testing.assert_close([x for x, _ in found], [x for x, _ in expected], rtol=1e-6, atol=1e-4)


def attention_of_lengths(q, k, v, q_ends, k_ends, q_longest, k_longest, *, causal):
    """What FlashAttention's kernel for sequences of different lengths gives, in fp32 by plain products."""
    assert (q_ends.diff().max(), k_ends.diff().max()) == (q_longest, k_longest)
    assert (q_ends[-1], k_ends[-1]) == (len(q), len(k))
    outs, normalizers = [], []
    for a, b, c, d in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True):
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->qhk", q[a:b], keys) / q.shape[2] ** 0.5
        if causal:
            scores = scores.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril()[:, None], -torch.inf)
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), values))
        normalizers.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(normalizers)


@pytest.mark.parametrize("n_kv_heads", [4, 1], ids=["mha", "mqa"])
def test_the_layout_for_gpus_gives_the_same(monkeypatch, n_kv_heads):
    model, asked = with_large_weights(replace(SMALL, n_kv_heads=n_kv_heads)), requests()
    expected = scores(model, asked, 10**6)
    monkeypatch.setattr(scoring, "_flash", attention_of_lengths)
    monkeypatch.setattr(scoring, "_attention", lambda batch, like, _: scoring._Packed(batch, like.device))
    for tokens in (300, 10**6):
        found = scores(model, asked, tokens)
        torch.testing.assert_close([x for x, _ in found], [x for x, _ in expected], rtol=1e-6, atol=1e-4)


def test_a_shared_prefix_is_computed_once(monkeypatch):
    model, seen = with_large_weights(SMALL), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: (seen.append(len(tokens)), embed(tokens))[1])
    # eight questions of 20 to 27 tokens with four answers of one token, behind 60 tokens of examples, and alone
    examples = list(range(60))
    asked = [([*shots, i, *[9] * (19 + i)], [c]) for shots in (examples, [80]) for i in range(8) for c in range(4)]
    scores(model, asked, 10**6)
    assert seen == [60 + sum(range(20, 28)) + 8 + sum(range(20, 28))]


def test_probabilities_are_over_the_ids_that_count():
    model = with_large_weights(SMALL)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]]))[0, -1]
        model.output.weight[90] = model.output.weight[logits[:90].argmax()] * 2
        logits = model(torch.tensor([[5, 6, 7]]))[0, -1]
    best = int(logits[:90].argmax())
    ((_, value, likeliest),) = Scorer(model, vocab_size=90).log_likelihoods([([5, 6, 7], [best])], tokens_per_batch=100)
    assert value == pytest.approx(logits[:90].log_softmax(-1)[best].item(), abs=1e-5)
    assert likeliest
    ((_, _, likeliest),) = Scorer(model).log_likelihoods([([5, 6, 7], [best])], tokens_per_batch=100)
    assert likeliest == (int(logits.argmax()) == best)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (([], [1]), "request 1 has an empty context"),
        (([1], []), "request 1 has an empty continuation"),
        (([1] * 220, [1, 2]), "request 1 has 221 tokens, but model.max_seq_len is 220"),
        (([1, 97], [1]), "request 1 has ids outside the vocabulary of 97"),
        (([1], [97]), "request 1 asks for ids outside the vocabulary of 97"),
    ],
)
def test_requests_that_cannot_be_scored_are_named(request_, reason):
    with pytest.raises(ValueError, match=reason):
        list(Scorer(with_large_weights(SMALL)).log_likelihoods([([1], [2]), request_], tokens_per_batch=100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("n_kv_heads", [4, 1], ids=["mha", "mqa"])
def test_log_likelihoods_on_a_gpu_are_those_of_the_cpu(precision, n_kv_heads):
    model, asked = with_large_weights(replace(SMALL, n_kv_heads=n_kv_heads)), requests()
    expected = scores(model, asked, 1000)
    found = scores(parallelize(model, None, "cuda", precision=precision), asked, 1000)
    worst = max(abs(a - b) / len(asked[i][1]) for i, ((a, _), (b, _)) in enumerate(zip(found, expected, strict=True)))
    assert worst < (1e-3 if precision == "fp32" else 0.3)
