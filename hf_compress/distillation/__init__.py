"""A student learns from its teacher's distributions over tokens.

losses.py   divergences, in chunks of tokens and fused with the head
trainer.py  `DistillationTrainer`
windows.py  windows as what a Trainer reads
"""
