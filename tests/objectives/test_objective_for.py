from __future__ import annotations

from types import SimpleNamespace

import pytest
from architectures import ARCHITECTURES, SIZES, base_of
from heads import model_of
from tiny_models import VOCAB
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from meta_peft.errors import MetaPeftError
from meta_peft.objectives import OBJECTIVES, head_of, known_labels, made_for, objective_for, objective_name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_chosen_by_what_the_model_is_made_for(kind: str):
    how = ARCHITECTURES[kind].loaded_with
    expected = {AutoModelForCausalLM: "causal_lm", AutoModelForMaskedLM: "masked_lm"}.get(how, "seq2seq_lm")
    assert objective_for(base_of(kind)) is OBJECTIVES[expected]
    assert objective_name(base_of(kind)) == ("speech_seq2seq" if kind == "whisper" else expected)


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [
        ("BertModel", "causal_lm"),
        ("BertForMaskedLM", "masked_lm"),
        ("RobertaForSequenceClassification", "sequence_classification"),
        ("LlamaForTokenClassification", "token_classification"),
    ],
)
def test_chosen_by_the_name_of_an_architecture(architecture: str, objective: str):
    assert made_for(AutoConfig.for_model("bert"), architecture) == objective


def test_a_name_comes_first():
    assert objective_for(base_of("llama"), "masked_lm") is OBJECTIVES["masked_lm"]
    with pytest.raises(MetaPeftError, match=r"Unknown objective 'mlm': expected one of \['causal_lm', 'masked_lm'"):
        objective_for(base_of("llama"), "mlm")
    with pytest.raises(MetaPeftError, match="Did you mean 'masked_lm'"):
        objective_for(base_of("llama"), "maskd_lm")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_under_a_head_for_next_tokens(kind: str):
    """It would see each token that it is to predict."""

    def model(is_decoder: bool):
        config = AutoConfig.for_model(kind, vocab_size=10, num_hidden_layers=1, is_decoder=is_decoder, **SIZES)
        return AutoModelForCausalLM.from_config(config)

    with pytest.raises(MetaPeftError, match=r"sees the tokens that it is to predict.*Load it with is_decoder=True"):
        objective_for(model(is_decoder=False))
    assert objective_for(model(is_decoder=True)) is OBJECTIVES["causal_lm"]
    assert objective_for(model(is_decoder=False), "masked_lm") is OBJECTIVES["masked_lm"]


@pytest.mark.parametrize("kind", ["rembert", "roformer", "megatron-bert", "xlm"])
def test_an_encoder_whose_attention_does_not_say_what_it_sees(kind: str):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    small = {"emb_dim": 16, "n_heads": 2, "n_layers": 1} if kind == "xlm" else sizes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=10, **small))
    with pytest.raises(MetaPeftError, match="sees the tokens that it is to predict"):
        objective_for(model, "causal_lm")


def test_a_decoder_that_was_made_to_see_ahead():
    base = base_of("llama")
    base.config.use_bidirectional_attention = True
    try:
        with pytest.raises(MetaPeftError, match="sees the tokens that it is to predict"):
            objective_for(base)
    finally:
        del base.config.use_bidirectional_attention


def test_a_decoder_whose_config_does_not_say_that_it_sees_ahead():
    """Its loss came out a third off, without a word."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 16, "num_hidden_layers": 1}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("cpmant", vocab_size=30, prompt_length=2, **sizes))
    with pytest.raises(MetaPeftError, match="CpmAntForCausalLM attends in both directions"):
        objective_for(base)


def test_a_model_that_names_an_embedding_as_its_head():
    """FSMT, whose head is another layer: gathering in front of the embedding gave shapes that fit nothing."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "src_vocab_size": 10, "tgt_vocab_size": 10}
    base = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("fsmt", langs=["en", "de"], **sizes))
    with pytest.raises(MetaPeftError, match=r"FSMTForConditionalGeneration names the embedding .* another type"):
        head_of(base)
    other = base_of("t5")
    assert head_of(other) is other.lm_head


def test_how_many_labels_a_model_knows():
    assert known_labels(base_of("llama"), "causal_lm") == VOCAB
    assert known_labels(model_of("bert").get_base_model(), "sequence_classification") == 3
    assert known_labels(SimpleNamespace(get_output_embeddings=nn.Identity), "causal_lm") is None
