"""The three sets of windows are exact cuts of their texts, and never share any of it."""

import itertools
import json
import logging
import random

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_compress.data import chat as chat_module
from hf_compress.data import windows as windows_module
from hf_compress.data.chat import added_bos
from hf_compress.data.windows import Windows, check_disjoint, load_windows
from hf_compress.errors import DataError
from hf_compress.recipe import Data

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}"
)


def byte_tokenizer(bos=False, template=None):
    """One token a byte, so that windows can be compared with the text by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


PLAIN, WITH_BOS = byte_tokenizer(), byte_tokenizer(bos=True)


def texts(num, seed=0):
    """Documents of random words; long runs of bytes do not repeat."""
    draw = random.Random(seed)
    return [
        " ".join(f"{draw.getrandbits(32):x}" for _ in range(draw.randint(3, 60)))
        for _ in range(num)
    ]


def settings(calibration="a.txt", evaluation="python-docs", *, num=(6, 3, 5), length=(80, 80)):
    sources = [
        {"source": source, "num_samples": num_samples, "max_seq_length": max_seq_length}
        for source, num_samples, max_seq_length in zip(
            (calibration, evaluation), (num[0], num[2]), length, strict=True
        )
    ]
    return Data(calibration=sources[0], evaluation=sources[1], num_fitness_samples=num[1])


def with_chat(data, keys=("calibration", "evaluation")):
    chat = {key: getattr(data, key).model_copy(update={"chat_template": True}) for key in keys}
    return data.model_copy(update=chat)


def rows(windows_NL):
    return {tuple(row) for row in windows_NL.tolist()}


def passages(windows_NL, size):
    return {
        tuple(row[start : start + size])
        for row in windows_NL.tolist()
        for start in range(len(row) - size + 1)
    }


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
def test_shapes_and_types(tokenizer):
    data = settings(num=(6, 3, 5), length=(80, 96))
    windows = load_windows(data, tokenizer, 0, calibration_texts=texts(50))
    assert windows.calibration.shape == (6, 80)
    assert windows.fitness.shape == (3, 80)
    assert windows.evaluation.shape == (5, 96)
    assert {w.dtype for w in vars(windows).values()} == {torch.int64}


def test_plain_windows_are_cuts_of_the_documents_joined_by_blank_lines():
    documents = texts(30)
    windows = load_windows(settings(), PLAIN, 0, calibration_texts=documents)
    joined = "\n\n".join(documents)
    for row in torch.cat([windows.calibration, windows.fitness]):
        position = joined.find(PLAIN.decode(row))
        assert position >= 0
        assert position % 80 == 0


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it():
    documents = texts(60)
    windows = load_windows(settings(), WITH_BOS, 0, calibration_texts=documents)
    starts_of_documents = 0
    for row in torch.cat([windows.calibration, windows.fitness, windows.evaluation]):
        assert row[0] == WITH_BOS.bos_token_id
        assert row[1] != WITH_BOS.bos_token_id
        starts_of_documents += int((row[1:] == WITH_BOS.bos_token_id).sum())
    assert starts_of_documents > 0


def test_no_token_is_lost_or_doubled_by_the_bos_rule():
    documents = texts(80)
    # More than half of the windows are asked for, so that each of the first ones is taken.
    num = sum(map(len, documents)) // 80
    data = settings("self", num=(1, 1, num))
    windows = load_windows(data, WITH_BOS, 0, sample=numbered, evaluation_texts=documents)
    cut = [WITH_BOS.decode(row, skip_special_tokens=True) for row in windows.evaluation]
    assert "\n\n".join(documents).startswith("".join(cut))


def test_bos_that_exists_but_is_not_added_is_not_used():
    assert added_bos(PLAIN) is None
    assert added_bos(WITH_BOS) == WITH_BOS.bos_token_id
    windows = load_windows(settings(), PLAIN, 0, calibration_texts=texts(30))
    assert not (windows.evaluation == PLAIN.bos_token_id).any()


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
@pytest.mark.parametrize("length", [(80, 80), (80, 200), (200, 80), (16, 72), (24, 24)])
@pytest.mark.parametrize("seed", range(5))
def test_sets_of_one_source_never_share_text(tmp_path, tokenizer, length, seed):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(120, seed)))
    path = str(tmp_path / "a.txt")
    windows = load_windows(settings(path, path, num=(7, 4, 6), length=length), tokenizer, seed)
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert len(rows(drawn)) == 11
    # Any run of 16 random bytes is unique in the text, so a shared run is shared text.
    assert not passages(drawn, 16) & passages(windows.evaluation, 16)
    assert not passages(windows.calibration, 16) & passages(windows.fitness, 16)


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_of_the_evaluation_text_under_another_name_is_found_out(tmp_path, seed):
    for name in ("a.txt", "b.txt"):
        # The copy is shifted: its windows are not those of the original.
        (tmp_path / name).write_text("shift" * (name == "b.txt") + "\n\n".join(texts(120)))
    data = settings(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), length=(128, 128))
    windows = load_windows(data, PLAIN, seed)
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert not passages(drawn, 64) & passages(windows.evaluation, 64)


def test_a_text_wholly_covered_by_the_evaluation_is_refused_with_both_names(tmp_path):
    text = "\n\n".join(texts(30))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    num = (6, 3, len(text) // 80 - 2)
    data = settings(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), num=num)
    with pytest.raises(DataError, match=r"a\.txt.*share no text with .*b\.txt"):
        load_windows(data, PLAIN, 0)


def test_the_same_seed_gives_the_same_windows_whatever_the_global_state(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(120)))
    data = settings(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"))
    torch.manual_seed(1)
    first = load_windows(data, PLAIN, 3)
    torch.manual_seed(2)
    second = load_windows(data, PLAIN, 3)
    for name in ("calibration", "fitness", "evaluation"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("same", [True, False])
def test_the_seed_changes_calibration_and_fitness_but_not_evaluation(tmp_path, same):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(120)))
    path = str(tmp_path / "a.txt")
    data = settings(path, path if same else "python-docs")
    first, second = load_windows(data, PLAIN, 0), load_windows(data, PLAIN, 1)
    assert torch.equal(first.evaluation, second.evaluation)
    assert rows(first.calibration) != rows(second.calibration)
    assert rows(first.fitness) != rows(second.fitness)


def test_evaluation_windows_are_spread_over_their_text():
    documents = texts(100)
    data = settings(calibration="python-docs")
    windows = load_windows(data, PLAIN, 0, evaluation_texts=documents)
    joined = "\n\n".join([*documents, ""])
    total, asked = len(joined) // 80, 5
    cut = [PLAIN.decode(row) for row in windows.evaluation]
    starts = [index * (total // asked) * 80 for index in range(asked)]
    assert cut == [joined[start : start + 80] for start in starts]


def test_repeated_documents_give_no_repeated_windows():
    documents = ["x" * 78] * 500 + texts(40)
    windows = load_windows(settings(), PLAIN, 0, calibration_texts=documents)
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert len(rows(drawn)) == len(drawn)


def test_too_short_says_how_many_there_are_and_how_many_were_asked():
    with pytest.raises(DataError, match=r"gives 3 windows of 80 .*9 were asked.*num_samples"):
        load_windows(settings(), PLAIN, 0, calibration_texts=["y" * 80, "z" * 200])
    with pytest.raises(DataError, match=r"gives 1 windows of 80 .*5 were asked.*num_samples"):
        load_windows(settings(), PLAIN, 0, evaluation_texts=["y" * 100])


@pytest.mark.parametrize("empty", [[], [""], iter([])])
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_no_text_at_all_is_refused(empty, role):
    data = settings(calibration="python-docs")
    with pytest.raises(DataError, match=f"{role}_texts holds no text"):
        load_windows(data, PLAIN, 0, **{f"{role}_texts": empty})


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.txt' holds no text"):
        load_windows(settings(str(tmp_path / "a.txt")), PLAIN, 0)


def test_one_string_is_not_taken_for_a_list_of_letters():
    with pytest.raises(DataError, match=r"calibration_texts is one string"):
        load_windows(settings(), PLAIN, 0, calibration_texts=texts(1)[0])


def test_given_texts_take_the_place_of_both_sources():
    data = settings("self", "self")
    documents = iter(texts(200))
    windows = load_windows(data, PLAIN, 0, calibration_texts=documents, evaluation_texts=documents)
    joined = "\n\n".join(texts(200))
    for row in itertools.chain(windows.calibration, windows.evaluation):
        assert PLAIN.decode(row) in joined
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert not passages(drawn, 16) & passages(windows.evaluation, 16)


def test_an_endless_iterable_is_read_only_as_far_as_needed():
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield texts(1, seed=number)[0]

    data = settings()
    windows = load_windows(data, PLAIN, 0, calibration_texts=endless())
    assert len(windows.calibration) == 6
    read = sum(len(texts(1, seed=number)[0]) for number in taken)
    needed = (6 + 3) * 80
    assert 3 * needed < read < 100 * needed


def test_a_hub_dataset_is_read_only_as_far_as_needed(monkeypatch):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield {"text": texts(1, seed=number)[0]}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: endless())
    data = settings("some-org/text", "some-org/text")
    windows = load_windows(data, PLAIN, 0)
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert not passages(drawn, 16) & passages(windows.evaluation, 16)
    assert len(taken) <= 2 * chat_module.DOCUMENTS_PER_BATCH


def test_reading_a_local_text_stops_at_the_cap_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(windows_module, "MAX_CHARACTERS", 10_000)
    monkeypatch.setattr(chat_module, "DOCUMENTS_PER_BATCH", 4)
    documents = texts(400)
    with caplog.at_level(logging.WARNING):
        load_windows(settings("python-docs"), PLAIN, 0, evaluation_texts=documents)
    assert "evaluation_texts; what follows is not used" in caplog.text


def test_self_takes_calibration_and_fitness_from_one_sample():
    asked = []

    def sample(num, length):
        asked.append((num, length))
        return torch.arange(num * length, dtype=torch.int32).reshape(num, length)

    windows = load_windows(settings("self"), PLAIN, 0, sample=sample)
    assert asked == [(9, 80)]
    drawn = torch.cat([windows.calibration, windows.fitness])
    assert torch.equal(drawn, torch.arange(720).reshape(9, 80))
    assert drawn.dtype == torch.int64


def test_self_without_a_model_or_for_evaluation_is_refused_before_anything_is_sampled():
    with pytest.raises(DataError, match="no model was given"):
        load_windows(settings("self"), PLAIN, 0)
    with pytest.raises(DataError, match="evaluation source cannot be `self`"):
        load_windows(settings("self", "self"), PLAIN, 0, sample=lambda num, length: 1 / 0)


def test_a_sample_of_the_wrong_shape_is_refused():
    with pytest.raises(DataError, match=r"\(9, 79\).*\(9, 80\)"):
        load_windows(
            settings("self"), PLAIN, 0, sample=lambda num, length: torch.zeros(num, length - 1)
        )


def test_a_model_that_recites_the_evaluation_text_is_found_out():
    recited = load_windows(settings("self"), PLAIN, 0, sample=numbered).evaluation

    def sample(num, length):
        return torch.cat([numbered(num - 1, length), recited[2:3]])

    with pytest.raises(DataError, match=r"fitness .*`self`.*evaluation .*`python-docs`.* share 1"):
        load_windows(settings("self"), PLAIN, 0, sample=sample)


def numbered(num, length):
    return torch.arange(1000, 1000 + num * length).reshape(num, length)


PAIRS = list(itertools.combinations(["calibration", "fitness", "evaluation"], 2))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("length", [128, 192])
def test_check_disjoint_finds_a_window_in_two_sets(pair, length):
    sets = {
        "calibration": numbered(3, 128),
        "fitness": numbered(3, 128) + 10_000,
        "evaluation": numbered(3, length) + 20_000,
    }
    check_disjoint(Windows(**sets), "one text", "another text")
    sets[pair[1]][2, 64:128] = sets[pair[0]][1, :64]
    if sets[pair[0]].shape == sets[pair[1]].shape:
        sets[pair[1]][2] = sets[pair[0]][1]
    with pytest.raises(DataError, match=rf"the {pair[0]} windows \(one text\).*{pair[1]}"):
        check_disjoint(Windows(**sets), "one text", "another text")


CHATS = [
    [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text}]
    for text in texts(60)
]


@pytest.mark.parametrize("bos", [False, True])
def test_conversations_go_through_the_chat_template(tmp_path, bos):
    tokenizer = byte_tokenizer(bos, TEMPLATE)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": chat}) + "\n" for chat in CHATS))
    windows = load_windows(with_chat(settings(str(tmp_path / "a.jsonl"))), tokenizer, 0)
    rendered = "".join(
        f"<s>[user]{chat[0]['content']}[assistant]{chat[1]['content']}" for chat in CHATS
    )
    for row in windows.calibration:
        text = tokenizer.decode(row)
        assert "<s><s>" not in text
        assert (text if not bos else text.removeprefix("<s>")) in rendered
        assert not bos or row[0] == tokenizer.bos_token_id


def test_a_text_is_a_turn_of_the_user_in_the_chat_template():
    tokenizer = byte_tokenizer(template=TEMPLATE)
    data = with_chat(settings(calibration="python-docs"))
    windows = load_windows(data, tokenizer, 0, evaluation_texts=["first" * 9, *texts(30)])
    text = tokenizer.decode(windows.evaluation.flatten())
    assert text.startswith("<s>[user]" + "first" * 9 + "<s>[user]" + texts(1)[0][:10])


def test_chat_template_without_one_on_the_tokenizer_is_refused():
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        load_windows(with_chat(settings()), PLAIN, 0, calibration_texts=CHATS)


def test_conversations_without_chat_template_are_refused():
    with pytest.raises(DataError, match="set chat_template: true"):
        load_windows(settings(), PLAIN, 0, calibration_texts=CHATS)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "system", "content": "be kind"}, "no system messages"),
        ({"from": "human", "value": "hi"}, "without a role"),
    ],
)
def test_what_the_chat_template_refuses_is_a_data_error(message, reason):
    tokenizer = byte_tokenizer(template=TEMPLATE)
    with pytest.raises(DataError, match=f"{reason}.*`role` and `content`"):
        load_windows(with_chat(settings()), tokenizer, 0, calibration_texts=[[message]])


def test_one_source_with_and_without_chat_template_cannot_be_kept_apart():
    data = with_chat(settings("python-docs", "python-docs"), keys=["calibration"])
    with pytest.raises(DataError, match="cannot be kept apart"):
        load_windows(data, byte_tokenizer(template=TEMPLATE), 0)
