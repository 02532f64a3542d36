from __future__ import annotations

import pytest
from architectures import ARCHITECTURES, SIZES, base_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from meta_peft.errors import MetaPeftError
from meta_peft.objectives import OBJECTIVES, made_for, objective_for, objective_name


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
