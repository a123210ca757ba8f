"""The stack: padding, packing, losses, checkpointing, and weights that survive their file."""

import pytest
import torch
from torch import Tensor, nn

from seqzoo.layers.base import Context
from seqzoo.zoo.config import ZooConfig
from seqzoo.zoo.inputs import last_document
from seqzoo.zoo.model import ZooForCausalLM, ZooForSequenceClassification, ZooModel
from tests.tolerances import law_budget, relative_error

USER = "zoo_test_user.mixers:Average"
HYBRID = {"pattern": [USER, "attention", "rg_lru", "swiglu"], "position": "rope"}
EMBEDDED = {"pattern": ["attention", "swiglu"], "position": "learned", "max_length": 32}
STACKS = pytest.mark.parametrize("decoder", [HYBRID, EMBEDDED], ids=["hybrid", "embedded"])
NEAR = law_budget(torch.float32)


def near(a: Tensor, b: Tensor) -> bool:
    return relative_error(a, b) <= NEAR


@STACKS
def test_padding_anywhere_changes_nothing_for_real_tokens(language_model, decoder):
    model = language_model(**decoder)
    ids = torch.randint(0, 41, (1, 6))
    alone = model(ids, use_cache=True)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0]])
    padded = torch.randint(0, 41, mask.shape)
    padded[mask.bool()] = ids[0]
    out = model(padded, attention_mask=mask, use_cache=True)
    assert near(out.logits[mask.bool()][None], alone.logits)
    more = torch.randint(0, 41, (1, 2))
    later = model(more, past_key_values=out.past_key_values)
    assert near(later.logits, model(more, past_key_values=alone.past_key_values).logits)


@STACKS
@pytest.mark.parametrize("name", ["document_ids", "seq_idx"])
def test_packed_documents_are_as_if_alone_also_across_passes(language_model, decoder, name):
    model = language_model(**decoder)
    ids = torch.randint(0, 41, (1, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    apart = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 3), (3, 7), (7, 9))], dim=1)
    assert near(model(ids, **{name: documents}).logits, apart)
    first = model(ids[:, :5], **{name: documents[:, :5]}, use_cache=True)
    second = model(ids[:, 5:], **{name: documents[:, 5:]}, past_key_values=first.past_key_values)
    assert near(torch.cat([first.logits, second.logits], dim=1), apart)
    third = model(ids[:, :1], past_key_values=second.past_key_values)  # goes on with document 2
    assert near(third.logits, model(torch.cat([ids[:, 7:], ids[:, :1]], 1)).logits[:, -1:])


def test_last_document_skips_padding_and_rows_without_real_tokens():
    ctx = Context(
        mask=torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(),
        document=torch.tensor([[4, 5, 9], [9, 9, 9]]),
        last_document=torch.tensor([3, 7]),
    )
    assert last_document(ctx).tolist() == [5, 7]
    assert last_document(Context(last_document=ctx.last_document)).tolist() == [3, 7]


@STACKS
def test_packed_loss_is_the_loss_of_the_documents(language_model, decoder):
    model = language_model(**decoder)
    ids = torch.randint(0, 41, (1, 9))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    apart = [model(x, labels=x).loss * (x.shape[1] - 1) for x in (ids[:, :4], ids[:, 4:])]
    packed = model(ids, document_ids=documents, labels=ids).loss
    assert near(packed, sum(apart) / 7)


def test_padded_targets_do_not_count_and_no_targets_is_zero(language_model):
    model = language_model(**HYBRID)
    ids = torch.randint(0, 41, (1, 5))
    padded = torch.cat([torch.full((1, 3), 7), ids, torch.full((1, 2), 7)], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5 + [0] * 2])
    loss = model(ids, labels=ids).loss
    assert near(model(padded, attention_mask=mask, labels=padded).loss, loss)
    assert near(model(ids, labels=ids, num_items_in_batch=8).loss, loss / 2)
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    assert nothing.item() == 0
    nothing.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("wrong", [-1, 41])
def test_ids_outside_of_the_vocabulary_are_named(language_model, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} is outside of the vocabulary, 0 to 40"):
        language_model(**HYBRID)(torch.tensor([[0, wrong]]))


def test_inputs_that_do_not_fit_are_refused(language_model):
    model = language_model(**HYBRID)
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 3\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="must be a ZooCache"):
        model(ids, past_key_values=[])


@STACKS
def test_given_positions_are_used_and_the_usual_ones_change_nothing(language_model, decoder):
    model = language_model(**decoder)
    ids = torch.randint(0, 41, (2, 5))
    usual = torch.arange(5)[None]
    assert near(model(ids, position_ids=usual).logits, model(ids).logits)
    stretched = model(ids, position_ids=usual * 3).logits
    assert not near(stretched, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast_stay_near_and_step_alike(language_model, dtype):
    model = language_model(**HYBRID)
    ids = torch.randint(0, 41, (2, 9))
    want = model(ids).logits
    with torch.autocast("cpu", dtype):
        assert relative_error(model(ids).logits.float(), want) < 0.1
    model = model.to(dtype)
    whole = model(ids).logits
    assert whole.dtype == dtype
    assert relative_error(whole.float(), want) < 0.1
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert relative_error(rest.logits.float(), whole[:, 4:].float()) < 0.05


def test_embeddings_instead_of_ids_give_the_same_numbers(language_model):
    model = language_model(**EMBEDDED)
    ids = torch.randint(0, 41, (2, 5))
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert embedded.logits.equal(model(ids).logits)


def test_logits_to_keep_and_empty_inputs(language_model):
    model = language_model(**HYBRID)
    ids = torch.randint(0, 41, (2, 5))
    whole = model(ids).logits
    assert near(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert near(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    assert model(ids[:, :0]).logits.shape == (2, 0, 41)
    assert model(ids[:0]).logits.shape == (0, 5, 41)


def enable_checkpointing(model):
    """By the name that this transformers has for it: 5.23 gave it a new one."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient_with_auxiliary_losses(language_model, dropout):
    decoder = {"pattern": [USER, "attention"], "repeats": 2, "dropout": dropout}
    decoder["options"] = {USER: {"loss": 0.1}}
    ids = torch.randint(0, 41, (2, 7))
    results = []
    for checkpointing in (False, True):
        model = language_model(**decoder).train()
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(5)
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append((out.loss, {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (checkpointed, recomputed) = results
    assert loss.equal(checkpointed)
    assert all(gradients[name].equal(recomputed[name]) for name in gradients)


def test_auxiliary_losses_of_all_entries_count_in_training_only(language_model):
    decoder = {"pattern": [USER, USER], "options": {USER: {"loss": 0.1}}}
    model = language_model(**decoder)
    ids = torch.randint(0, 41, (2, 7))
    judged = model(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    assert judged.aux_loss > 0
    assert near(trained.loss, judged.loss + judged.aux_loss)
    alone = [language_model(pattern=[USER], options={USER: {"loss": 0.1}})(ids).aux_loss]
    assert judged.aux_loss > alone[0]


def test_experts_report_loss_and_statistics_by_entry(language_model):
    out = language_model(pattern=["switch", "switch"])(torch.randint(0, 41, (2, 7)))
    assert out.aux_loss > 0
    assert {name.split(".")[0] for name in out.stats} == {"0", "1"}


@pytest.mark.parametrize("tie", [True, False])
@STACKS
def test_a_reloaded_model_is_bit_identical(language_model, decoder, tie, tmp_path):
    model = language_model(**decoder, tie_embeddings=tie)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # nothing is where an initialiser would put it
    model.save_pretrained(tmp_path)
    again, report = ZooForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    loaded = dict(again.named_parameters()) | dict(again.named_buffers())
    assert tensors.keys() == loaded.keys()
    assert any("decay" in name for name in tensors) == (decoder is HYBRID)
    for name, tensor in tensors.items():
        assert tensor.equal(loaded[name]), name
    ids = torch.randint(0, 41, (2, 9))
    assert again(ids).logits.equal(model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tie


def test_a_missing_parameter_is_initialised_and_its_module_keeps_the_loaded_ones(
    language_model, tmp_path
):
    model = language_model(pattern=["rg_lru"])
    with torch.no_grad():
        model.model.entries[0].mixer.decay_param.fill_(0.25)
    state = model.state_dict()
    del state["model.entries.0.mixer.gate_bias"]
    model.save_pretrained(tmp_path, state_dict=state)
    mixer = ZooForCausalLM.from_pretrained(tmp_path).model.entries[0].mixer
    assert (mixer.decay_param == 0.25).all()
    assert (mixer.gate_bias == 0).all()


def test_resizing_the_vocabulary_keeps_the_tie_and_the_old_rows(language_model):
    model = language_model(**HYBRID)
    ids = torch.randint(0, 41, (1, 5))
    before = model(ids).logits
    model.resize_token_embeddings(50)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert near(model(ids).logits[..., :41], before)
    assert model(torch.tensor([[49]])).logits.shape == (1, 1, 50)


def test_swapping_an_entry_leaves_all_others_and_the_generator_alone(language_model):
    plain = {"pattern": ["rg_lru", "attention", "swiglu"], "repeats": 2, "tie_embeddings": False}
    models, after = [], []
    for swap in ({}, {2: "mamba"}):
        models.append(language_model(**plain, swap=swap))
        after.append(torch.rand(3))
    one, other = (dict(model.named_parameters()) for model in models)
    kept = [name for name in one if not name.startswith("model.entries.2.")]
    assert len(kept) > 10
    assert all(one[name].equal(other[name]) for name in kept)
    assert after[0].equal(after[1])
    repeated = one["model.entries.0.mixer.in_proj.weight"]
    assert not repeated.equal(one["model.entries.3.mixer.in_proj.weight"])
    another = dict(language_model(**plain, seed=1).named_parameters())
    assert not repeated.equal(another["model.entries.0.mixer.in_proj.weight"])


def test_a_mixer_in_a_model_starts_like_the_mixer_alone(language_model):
    layer = language_model(pattern=["attention"]).model.entries[0].mixer.q_proj
    assert isinstance(layer, nn.Linear)
    assert 0.8 * 16**-0.5 < layer.weight.abs().max() <= 16**-0.5


def test_a_classifier_ignores_padding_and_reads_both_ways():
    decoder = {"d_model": 16, "pattern": ["attention", USER, "swiglu"], "causal": False}
    config = ZooConfig(decoder=decoder, num_labels=3, initializer_range=0.5)
    model = ZooForSequenceClassification(config).eval()
    ids = torch.randint(0, 41, (1, 5))
    padded = torch.cat([torch.full((1, 2), 7), ids, torch.full((1, 1), 7)], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    assert near(model(padded, attention_mask=mask).logits, model(ids).logits)
    loss = model(ids, labels=torch.tensor([2])).loss
    assert near(loss, -model(ids).logits.log_softmax(-1)[0, 2])
    hidden = model.model(ids).last_hidden_state
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 41], 1)
    assert not near(model.model(changed).last_hidden_state[:, :1], hidden[:, :1])
    with pytest.raises(ValueError, match="use_cache=False"):
        model.model(ids, use_cache=True)
    with pytest.raises(ValueError, match="causal: true"):
        ZooForCausalLM(config)


def test_a_causal_stack_classifies_too():
    config = ZooConfig(decoder={"d_model": 16, "pattern": [USER]}, num_labels=2)
    assert ZooForSequenceClassification(config)(torch.zeros(3, 4).long()).logits.shape == (3, 2)


def test_hidden_states_are_the_stream_and_the_end(language_model):
    out = language_model(**HYBRID).model(torch.randint(0, 41, (1, 3)), output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert out.hidden_states[-1] is out.last_hidden_state


def test_an_entry_compiles_whole(language_model):
    entry = language_model(pattern=["attention"]).model.entries[0]
    x = torch.randn(2, 8, 16)
    compiled = torch.compile(entry, fullgraph=True, backend="aot_eager")
    assert near(compiled(x, None, Context()).x, entry(x, None, Context()).x)


def test_a_model_with_a_mask_exports_without_looking_at_data(language_model):
    model = language_model(pattern=["attention", "swiglu"])
    ids = torch.randint(0, 41, (2, 8))
    given = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    program = torch.export.export(model, (ids,), given).module()
    assert near(program(ids, **given).logits, model(ids, **given).logits)


def test_a_model_is_built_on_the_meta_device():
    with torch.device("meta"):
        model = ZooModel(ZooConfig(decoder={"d_model": 16, **HYBRID}))
    assert {p.device.type for p in model.parameters()} == {"meta"}
