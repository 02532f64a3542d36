"""The border to PEFT: LoRA layers, DoRA's norms, and heads."""
