"""The model registry: what is packed, how it is loaded, and who is champion.

packaged_model.py travels with a model, and package.py registers it; loading.py loads it, trained.py puts it together
from parts and weights alone. gate.py judges a candidate by numbers, promote.py moves the aliases under lock.py and
record.py writes down why. subject.py finds what a command was told to look at.
"""
