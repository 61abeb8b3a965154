"""Which branches of a plugin's package ran during the checks, and which did not.

* recording.py: coverage.py around each check, in this process and in those that it starts
* source.py: the functions that the quantizer can reach; a copy with a line for each part
* tour.py: small uses in processes where no compiler hides the source
* branches.py: joins all: what ran, what did not, what the plugin's pyproject.toml explains
"""
