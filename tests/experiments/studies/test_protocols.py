"""The tables are the paper's, and name only what exists."""

from experiments.config import registry
from experiments.config.federated import check_config
from experiments.studies import paper, protocols


def test_every_row_has_a_config_of_its_method():
  for row in protocols.rows_of(protocols.TABLES):
    config = paper.config_of(row)
    assert row.method in registry.methods() and row.protocol in protocols.PROTOCOL_LABELS
    assert config.gated == (row.method == "metagater") and config.local_steps == row.local_steps
    # The same number of tasks and samples for all methods of a protocol; rounds are found for each by one rule.
    shared = check_config(protocols.protocol_config(row.protocol))
    for field in ("tasks", "target_tasks", "validation_tasks", "cohort", "batch_size", "size_range", "adapt_steps"):
      assert config[field] == shared[field]


def test_rows_of_the_paper_have_its_times_and_ours_have_none():
  for number, table in protocols.TABLES.items():
    for row in table.rows if number.isdigit() else ():
      assert (row.paper_seconds is None) == (row in protocols.EXTRA or row.method == "metasnip_channel"), row


def test_metasnip_comes_after_what_it_starts_from():
  rows = [row[:3] for row in protocols.rows_of(["2", "6"])]
  assert len(set(rows)) == len(rows)
  for protocol, method, steps in rows:
    if protocols.is_pruning(method):
      for needed in ("metagater_ungated", "metagater"):
        assert rows.index((protocol, needed, steps)) < rows.index((protocol, method, steps))
