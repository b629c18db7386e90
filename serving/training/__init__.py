"""questions and passages -> a LoRA adapter that answers with the sentence that answers, or refuses.

examples.py   sources (read in place) -> topics: passages with the questions that they answer and do not answer
packing.py    topics -> packs: several passages as one context, and many questions that share it
lora.py       the adapter: layers, the PEFT file format, merging into the weights
train.py      packs -> adapter, with checkpoints; `python -m goldgate.serving.training.train --help`
judge.py      adapter -> report on texts and a domain never seen; `python -m goldgate.serving.training.judge --help`
"""
