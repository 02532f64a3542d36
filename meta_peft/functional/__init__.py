"""The PEFT model as a function of its fast weights."""
