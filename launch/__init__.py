"""Starting the other packages as processes: the demo, ranks on one machine, the cluster's facts.

Imports no torch.
"""
