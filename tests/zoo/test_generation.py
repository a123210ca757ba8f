"""Generation with the cache is generation without it, in every mode that transformers has."""

import copy

import pytest
import torch

from seqzoo.zoo.cache import ZooCache
from tests.tolerances import law_budget, relative_error

USER = "zoo_test_user.mixers:Average"
STACK = {"pattern": [USER, "attention", "rg_lru", "local", "swiglu"], "position": "rope"}
STACK["options"] = {"local": {"is": "attention", "window": 3, "position": "alibi"}}
OPTIONS = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
NEAR = law_budget(torch.float32)


@pytest.fixture
def model(language_model):
    model = language_model(**STACK, tie_embeddings=False)  # a tied one repeats itself
    with torch.no_grad():
        for parameter in model.model.entries.parameters():
            parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)  # what mixers say must matter
    return model


@pytest.fixture
def ids():
    return torch.randint(1, 41, (2, 6))


def test_greedy_is_the_same_with_and_without_a_cache(model, ids):
    cached = model.generate(ids, **OPTIONS)
    assert cached.equal(model.generate(ids, use_cache=False, **OPTIONS))
    assert len(cached[0, 6:].unique()) > 3


def test_logits_of_every_step_are_those_of_one_pass(model, ids):
    out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **OPTIONS)
    whole = model(out.sequences).logits[:, 5:-1]
    assert relative_error(torch.stack(out.logits, dim=1), whole) <= NEAR
    assert isinstance(out.past_key_values, ZooCache)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams_are_the_same_with_and_without_a_cache(model, ids, mode):
    cached = model.generate(ids, **OPTIONS, **mode)
    assert cached.equal(model.generate(ids, use_cache=False, **OPTIONS, **mode))


def test_samples_are_the_same_with_and_without_a_cache(model, ids):
    options = OPTIONS | {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        sampled.append(model.generate(ids, use_cache=use_cache, **options))
    assert sampled[0].equal(sampled[1])
    assert sampled[0].shape == (4, 14)
    assert not sampled[0][0].equal(sampled[0][1])


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_left_padded_batch_generates_what_each_row_generates(model, mode):
    rows = [torch.randint(1, 41, (1, n)) for n in (3, 6, 5)]
    batch, mask = torch.full((3, 6), 9), torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 6 - row.shape[1] :], mask[i, 6 - row.shape[1] :] = row[0], 1
    together = model.generate(batch, attention_mask=mask, **OPTIONS, **mode)
    for i, row in enumerate(rows):
        alone = model.generate(row, **OPTIONS, **mode)
        assert together[i, 6:].equal(alone[0, row.shape[1] :])


def test_embeddings_as_a_prompt_generate_the_same(model, ids):
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **OPTIONS)
    assert embedded.equal(model.generate(ids, **OPTIONS)[:, 6:])


def test_packed_documents_generate_as_the_last_one_alone(model, ids):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, 6)
    packed = model.generate(ids, document_ids=documents, **OPTIONS)
    assert packed[:, 6:].equal(model.generate(ids[:, 3:], **OPTIONS)[:, 3:])


def test_a_returned_cache_continues_one_long_run(model, ids):
    options = OPTIONS | {"return_dict_in_generate": True}
    half = model.generate(ids, **options | {"max_new_tokens": 4})
    assert half.past_key_values.get_seq_length() == 9
    rest = model.generate(
        half.sequences, past_key_values=half.past_key_values, **options | {"max_new_tokens": 4}
    )
    assert rest.sequences.equal(model.generate(ids, **OPTIONS))


def test_a_prompt_read_in_pieces_generates_the_same(model, ids):
    pieces = model.generate(ids, past_key_values=ZooCache(), prefill_chunk_size=4, **OPTIONS)
    assert pieces.equal(model.generate(ids, **OPTIONS))


@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": True}])
def test_assisted_decoding_is_refused(model, ids, mode):
    if "assistant_model" in mode:
        mode = {"assistant_model": model}
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids[:1], **OPTIONS, **mode)


def test_cache_rows_can_be_taken_repeated_and_reset(model, ids):
    with torch.no_grad():  # only leaves can be copied
        cache = model(ids, use_cache=True).past_key_values
    assert (cache.batch_size, len(cache), cache.get_seq_length()) == (2, 5, 6)
    more = torch.randint(1, 41, (2, 3))
    want = model(more, past_key_values=copy.deepcopy(cache)).logits
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        got = model(more[rows], past_key_values=changed).logits
        assert relative_error(got, want[rows]) <= NEAR
    cache.reset()
    assert cache.batch_size == -1
    assert model(ids, past_key_values=cache).logits.equal(model(ids, use_cache=True).logits)


def test_cache_remembers_documents_of_the_rows_that_it_takes(model, ids):
    documents = torch.tensor([[0] * 6, [0] * 3 + [1] * 3])
    cache = model(ids, document_ids=documents, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.last_document.tolist() == [1, 0]


def test_cache_cannot_be_cropped_or_given_keys(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(TypeError, match="no keys and values"):
        cache.update(ids, ids, 0)


def test_state_bytes_of_a_recurrent_stack_are_constant_and_as_declared(language_model):
    model = language_model(pattern=["rg_lru", USER])
    declared = sum(entry.mixer.cost(10).state_bytes for entry in model.model.entries)
    for length in (10, 200):
        cache = model(torch.randint(0, 41, (2, length)), use_cache=True).past_key_values
        assert cache.state_bytes() == 2 * declared


def test_a_training_pass_makes_no_cache_unless_asked(model, ids):
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
