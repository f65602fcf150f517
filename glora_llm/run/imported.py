"""Import what a trial needs. The process that trials are forked from imports this module, and nobody else does."""

from glora_llm.launch.quiet import quiet_libraries

quiet_libraries()

import glora_llm.run.train  # noqa: E402, F401
