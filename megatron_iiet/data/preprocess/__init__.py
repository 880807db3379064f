"""Text files to token shards: resumable, shared by jobs and worker processes, the same bytes every time.

In the order of the work: :mod:`options`; :mod:`plan` (what is to be made), :mod:`settle` (compared with what
was begun) with :mod:`changes` and :mod:`finished`; :mod:`run` (the whole); :mod:`work` (who does what);
:mod:`tasks` (the work itself) with :mod:`dedup`; :mod:`records` (what is finished); :mod:`shuffle`;
:mod:`lists` (the end, and what is told).
"""

from megatron_iiet.data.preprocess.lists import PreprocessReport
from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.preprocess.run import preprocess

__all__ = ["PreprocessOptions", "PreprocessReport", "preprocess"]
