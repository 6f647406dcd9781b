"""One question about many prompts: a record each, from one process, several, or a cluster; the file is the journal.

`measures` has the questions, `study` the loop, `workers` the executors, `merging` puts the files of shards together.
"""

from ggjac.studies.measures import Measure, measure
from ggjac.studies.merging import merge
from ggjac.studies.study import Study, ranks, shard_name, study

__all__ = ["Measure", "Study", "measure", "merge", "ranks", "shard_name", "study"]
