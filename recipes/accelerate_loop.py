"""A training loop of your own: accelerate launch recipes/accelerate_loop.py train.jsonl OUTPUT [STEPS [BASE_MODEL]]"""

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

import meta_peft as mp
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.base import load_base, load_tokenizer


def main(tasks: str, output: str, steps: int = 100, base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)  # LoRA starts from the same random numbers in every process
    base, tokenizer = load_base(mp.ModelArguments(base_model, load_in_4bit=True)), load_tokenizer(base_model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    loss_fn, rule = mp.AdapterLoss(model), mp.InnerRule(mp.Adam(), lr=2e-3, steps=3, learn_rates=True)
    weights, prompt_format = loss_fn.weights.parameters(), mp.PromptFormat()
    rows = mp.TaskSet.from_jsonl(tasks).encoded(prompt_format, tokenizer, max_length=256)
    episodes = mp.EpisodeDataset(rows, shots=4, query_size=4, length=steps * 8)
    spread = {"processes": accelerator.num_processes, "process": accelerator.process_index}
    shares = mp.StepShares(episodes, mp.EpisodeCollator(tokenizer.pad_token_id), tasks_per_step=8, **spread)
    rates = mp.LearnedRates(rule, weights)
    groups = [{"params": weights.values(), "lr": 1e-3}, {"params": rates.parameters(), "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # decay would pull the log rates to 0, a rate of 1
    step_sum = mp.StepSum(weights, rates.values())
    for share in shares:
        for batch in share.batches:
            step_sum.add(mp.meta_gradient(loss_fn, batch.to(accelerator.device), mp.MAML(rule), rates))
        step_sum.fail(share.error)
        gradient = step_sum.total().gradient  # of all processes, however the tasks are spread over them
        mp.assign_gradient(gradient, loss_fn, rates)
        optimizer.step()
        accelerator.print(f"loss {float(gradient.metrics['loss']):.3f}")
    sidecar = Sidecar("maml", rule, tuple(weights), rates.log_rates, prompt_format, 256, BaseIdentity.of(base), shots=4)
    accelerator.on_main_process(mp.save)(model, sidecar, output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]), *sys.argv[4:5])
