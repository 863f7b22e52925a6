"""What measured errors promise and what they do not, as the study's page tells it."""

from __future__ import annotations

from models.verify_study_faults import BOUND_ALARM, FALSE_ALARMS

PROMISES = """A request with `"verify": true` is told how far its attention was from exact: some rows of
every layer are computed a second time, exactly, and compared. This page says what these figures
promise, what they do not, and how often they kept their word where the truth was known on every row.

- **`estimate`** is the error of a layer, |(ô − o) W_O| / |o W_O| over all its rows, from the rows
  looked at. It is *an estimate*: right on average to within the bias below, and off by its spread in a
  single answer. The answer's figure is the largest over the layers, so it can lean upward: of many
  layers the one whose draw happened to be unlucky is told.
- **`approx_upper_95`** is meant to lie above the true error of the layer in 95 of 100 requests. It is
  *approximate*: it comes from the rows looked at, and what few rows hold does not show in rows that
  were not looked at. Read its coverage below. No figure from so few rows can do better without
  assumptions: a bound on a mean that holds whatever the distribution would be too wide to be of use.
- **`row_bound`** *does* hold whatever the distribution: with 95 % confidence at least 95 % of the
  layer's rows have a relative error of at most so much. It says nothing about the worst 5 % of the
  rows, and nothing about how the error is spread below it. The confidence is one layer's: of many
  layers some will miss. It is `null` where too few rows were drawn evenly (fewer than 59), and certain
  where all were looked at (`"all"`, or a prompt of up to 128 tokens).
- All of them are **local to a layer**: the same queries, keys and values, exact attention beside the
  one used. They do not bound what the answer would have been with exact attention in every layer;
  `/v1/compare` measures that.
- An error of few rows may go **unseen**. If 1 row in 100 is broken, some 64 even rows miss all of them
  about every second time (see the faults below). For a document that matters, ask for `"rows": "all"`:
  then nothing is estimated."""

COLUMNS = """- **true error**: mean over the layers, and from the least to the largest layer.
  **rows**: looked at, mean.
- **bias**: mean of the estimates against the truth, mean over the layers; **spread**: their standard
  deviation, relative to the truth. Behind the stroke the worst layer.
- **upper covers**: share of draws in which `approx_upper_95` was not below the true error, all layers,
  and the worst layer; **upper / true**: median of what it costs in tightness.
- **bound covers**: share of draws in which at least 95 % of the rows lay at or below `row_bound`, all
  layers, and the worst layer. The promise is 95 %.
- **answer**: the same for what an answer tells, the largest over these layers against the largest true
  error: bias of the estimate, and coverage of the upper value. More layers than these lean more."""

FAULTS = f"""## Planted faults

Some rows are broken: a wrong vector as long as the exact output is added to theirs, an error of 1.0 on
top of what there is. The backend's own estimate of what it left out knows nothing of it, the worst case
for a draw that follows it. Scattered anywhere, or one stretch; another place in every draw.

- **hit**: probability that the even rows contain a broken one: 1 − C(N − K, n) / C(N, n), and as
  counted.
- **bound**: draws with `row_bound` ≥ {BOUND_ALARM}, an alarm. The line of 0 % shows the false ones: layers
  in which one row in twenty errs so much anyway.
- **upper**: draws with `approx_upper_95` above what {100 * FALSE_ALARMS:.0f} % of the draws
  without a fault exceed: what a threshold set on a service's own history would see.
- **covers**: `approx_upper_95` not below the true error, fault included. Where it is far from 95 % the
  upper value was told by rows that missed the fault."""

DECODE = """## Decode steps

While tokens are generated one step in sixteen is looked at. Here the last rows of the decoder's text stand
for the steps. **given**: share of draws in which there is such a figure at all; the rest, among the draws
that gave it, as above."""

DENOMINATORS = """## The denominator

The error divides by sum |o W_O|² over all rows, which nobody computed. Four ways to it, on the same rows:
**Ŷ**, the sum of |ô W_O|² over all rows, which the forward computed; **Ŷ corrected** by the difference on the
rows looked at; **sampled** from these rows alone, as the numerator is; **regression**, both sums corrected
by how far the rows looked at are off in Ŷ. Bias / spread of the estimate, means over layers (the worst
layer); a dash where some draw had a sum that was not above 0. The served figures use **sampled**: where
errors are as large as outputs both sums rise and fall together. It is at its worst in a layer where few
rows hold most of the output."""
