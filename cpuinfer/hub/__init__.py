"""Models by name: pulled from the Hugging Face hub, verified, and found again.

`names.py` reads the names people type and chooses among the files of a repository, `store.py`
knows what is on this computer and needs no network, `network.py` makes the requests, `remote.py`
asks the hub what a repository has, `download.py` fetches one file, and `pull.py` puts these
together.
"""
