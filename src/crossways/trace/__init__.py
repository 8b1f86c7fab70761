"""What the routers of a model executed, recorded with bounded memory: `with traced(model) as trace: ...`."""

from crossways.trace.files import load_trace, save_trace
from crossways.trace.path_counts import PathCounts
from crossways.trace.recording import traced
from crossways.trace.sums import Trace, TraceSettings

__all__ = ["PathCounts", "Trace", "TraceSettings", "load_trace", "save_trace", "traced"]
