"""A student learns from its teacher's distributions over tokens.

losses.py   divergences, in chunks of tokens and fused with the head
trainer.py  `DistillationTrainer`
teacher.py  another model as the teacher, in 8 or 4 bits if asked
cache.py    a teacher's distributions written down once, as draws
lora.py     adapters on the student
windows.py  windows as what a Trainer reads
"""
