"""What is generated is what teacher forcing would choose, token by token, and what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers
from grid import forced

from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.decode import decode
from vlm_adapt.language.language import Generation, LanguageInput
from vlm_adapt.sentence import Sentence, Text

torch.set_num_threads(1)
QUESTIONS = ["what color is the shape?", "is the circle red?", "no", "two cats yes yes blue"]
LENGTH = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.vit(folder / "vit")
    tiny.llama(folder / "llama")
    tiny.t5(folder / "t5")
    for family in ("gpt2", "gemma3", "mistral"):
        tokenizer = tiny.tokenizer(folder / family)
        name, settings = tiny_languages.FAMILIES[family]
        more = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        long = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
        config = getattr(transformers, f"{name}Config")(**settings | more | long)
        tiny.seeded(transformers.AutoModelForCausalLM.from_config, config).save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("language", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("prefix_lm", [False, True], ids=["causal", "prefix_lm"])
def test_greedy_equals_teacher_forcing(parts: Path, language: str, prefix_lm: bool) -> None:
    """Prompts of unequal length in one batch, with images, far beyond any window."""
    ours = rows.assemble(parts / "vit", parts / language, prefix_lm=prefix_lm, template="bare")
    template = ours.template
    sentences = [
        template.conversation(rows.chat("<image>" * (number % 3) + question))
        for number, question in enumerate(QUESTIONS)
    ]
    encoded = [rows.row(ours, sentence, seed, learn=False) for seed, sentence in enumerate(sentences)]
    batch = rows.batch(ours, encoded)
    assert batch.plain != prefix_lm and not (batch.documents_BT > 0).all()
    answers = ours.model.generate(batch, Generation(LENGTH), set())
    assert len({tuple(answer) for answer in answers}) > 1
    for seed, (sentence, answer) in enumerate(zip(sentences, answers, strict=True)):
        assert len(answer) == LENGTH
        assert answer == forced(ours, sentence, seed, answer)


@pytest.mark.parametrize("language", ["llama", "gpt2", "gemma3", "mistral"])
def test_branches_write_what_they_would_alone(parts: Path, language: str) -> None:
    """Rows of different numbers of branches; each writes as its own conversation would."""
    ours = rows.assemble(parts / "vit", parts / language, template="plain")
    groups = [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3]]
    batch = rows.batch(
        ours,
        [
            rows.row(ours, ours.template.questions([(q, None) for q in group], images=1), seed, learn=False)
            for seed, group in enumerate(groups)
        ],
    )
    together = iter(ours.model.generate(batch, Generation(LENGTH), set()))
    for seed, group in enumerate(groups):
        for question in group:
            sentence = ours.template.conversation(rows.chat(f"<image>\n{question}"))
            answer = next(together)
            assert answer == forced(ours, sentence, seed, answer)


def test_encoder_decoder_equals_teacher_forcing(parts: Path) -> None:
    ours = rows.assemble(parts / "vit", parts / "t5")
    sentences = [
        ours.template.conversation(rows.chat("<image>" * number + question))
        for number, question in enumerate(QUESTIONS)
    ]
    batch = rows.batch(ours, [rows.row(ours, s, i, learn=False) for i, s in enumerate(sentences)])
    answers = ours.model.generate(batch, Generation(LENGTH), set())
    batch.decoder_ids_BU = torch.tensor([[ours.model.language.start_id, *answer[:-1]] for answer in answers])
    assert ours.model.logits(batch).argmax(-1).tolist() == answers


def test_encoder_decoder_goes_on_after_earlier_answers(parts: Path) -> None:
    """Turns after the first answer are the decoder's past: of unequal lengths in one batch."""
    ours = rows.assemble(parts / "vit", parts / "t5")
    talks = [["<image>no", "red blue", "is the shape red?"], ["two"], ["a", "yes", "no"]]
    prompts = [rows.conversation(ours, *talk, seed=i, learn=False) for i, talk in enumerate(talks)]
    answers = ours.model.generate(rows.batch(ours, prompts), Generation(LENGTH), set())
    for prompt, answer in zip(prompts, answers, strict=True):
        start = len(prompt.decoder_ids)
        prompt.decoder_ids = np.concatenate([prompt.decoder_ids, answer[:-1]])
        logits_BUV = ours.model.logits(rows.batch(ours, [prompt]))
        assert logits_BUV[0, start - 1 :].argmax(-1).tolist() == answer


@pytest.mark.parametrize("family", tiny_languages.FAMILIES)
def test_equals_the_library(family: str) -> None:
    """Text alone, one row and padded rows: transformers' own greedy generate, for every family."""
    model = tiny_languages.model(family)
    language = CausalLanguage(model).eval()
    ids_BT = torch.randint(3, tiny_languages.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    lengths = [9, 5]
    want = [
        model.generate(
            ids_BT[i : i + 1, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )[0, length:].tolist()
        for i, length in enumerate(lengths)
    ]
    valid_BT = torch.arange(9)[None] < torch.tensor(lengths)[:, None]
    embeds_BTD = language.embed(ids_BT).detach()
    got = language.generate(LanguageInput(embeds_BTD, valid_BT), Generation(LENGTH), set())
    assert got == want
    alone = language.generate(LanguageInput(embeds_BTD[:1], valid_BT[:1]), Generation(LENGTH), set())
    assert alone == want[:1]


def test_encoder_decoder_equals_the_library(parts: Path) -> None:
    ours = rows.assemble(parts / "vit", parts / "t5")
    model, tokenizer = ours.model.language.model, ours.tokenizer
    prompts = [
        ours.encoder.encode(Sentence((Text(question),)), 0, "q", learn=False) for question in QUESTIONS
    ]
    got = ours.model.generate(rows.batch(ours, prompts), Generation(LENGTH), ours.stop_ids)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.from_numpy(prompt.ids)[None]
        want = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, 1:].tolist()
        assert answer == [token for token in want if token != tokenizer.eos_token_id]


def table(logits_VV: torch.Tensor) -> Any:
    """A language whose next token depends on the last alone."""
    return logits_VV[:2], lambda ids_B: logits_VV[ids_B]


def test_stop_ids_end_rows_one_by_one() -> None:
    # 0 -> 2 -> 3 -> 4 -> 5 and 1 -> 5: with 4 and 5 as stops the rows write [2, 3] and [].
    follows = torch.tensor([2, 5, 3, 4, 5, 5])
    heard: list[list[int | None]] = []
    settings = Generation(10, on_token=heard.append)
    logits = torch.nn.functional.one_hot(follows, 6).float()
    assert decode(*table(logits), settings, {4, 5}) == [[2, 3], []]
    assert heard == [[2, None], [3, None], [None, None]]  # stops as soon as every row has
    assert decode(*table(logits), Generation(2), set()) == [[2, 3], [5, 5]]


def test_streaming_hears_every_token(parts: Path) -> None:
    ours = rows.assemble(parts / "vit", parts / "llama")
    batch = rows.batch(ours, [rows.conversation(ours, question, learn=False) for question in QUESTIONS])
    heard: list[list[int | None]] = []
    answers = ours.model.generate(batch, Generation(LENGTH, on_token=heard.append), ours.stop_ids)
    for row, answer in enumerate(answers):
        assert [step[row] for step in heard if step[row] is not None] == answer


def test_sampling() -> None:
    """Seeded, faithful to the probabilities, and greedy where the nucleus holds one word."""
    generator = torch.Generator().manual_seed(0)
    logits_VV = torch.randn(8, 8, generator=generator)

    def write(**settings: Any) -> list[list[int]]:
        return decode(*table(logits_VV), Generation(20, **settings), set())

    greedy = write()
    assert write(temperature=1.0, top_p=1e-6, seed=5) == greedy
    assert write(temperature=1e-4, seed=5) == greedy
    assert write(temperature=1.0, seed=5) == write(temperature=1.0, seed=5)
    assert len({str(write(temperature=1.0, seed=seed)) for seed in range(5)}) == 5

    likely = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = decode(
        likely.expand(4000, 4), lambda ids: likely.expand(4000, 4), Generation(1, 1.0, 0.75, 3), set()
    )
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=4) / 4000
    # The nucleus of 0.75 is the first two; 0.03 is four standard errors of 4000 draws.
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0)
