"""What continues the series of each place beyond the context: a place is a row, a frame a column, absent values are not numbers."""

from __future__ import annotations

import numpy as np

from models.baselines.per_case import Case, PerCase


class CaseSeries(PerCase):
    """Subclasses continue series. A place without one is answered with the mean of all that is known, and its standard deviation."""

    tasks = frozenset({"forecast"})

    def continued(self, series: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Means [P,steps] and their scales [P,steps] of the frames after series [P,T] of one variable, each with a value somewhere."""
        raise NotImplementedError

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        ahead = case.asked.frame - case.frames
        if ahead.min() < 0:
            raise ValueError(
                f"{type(self).__name__} continues series beyond the context, and is asked {-int(ahead.min())} frames before its end: "
                "ask for leads from 1 on (`min_lead` of the windows, `leads` of the scores)"
            )
        place, row = np.unique(case.known.place, axis=0, return_inverse=True)
        number = {tuple(each): i for i, each in enumerate(place)}
        asked = np.array([number.get(tuple(each), -1) for each in case.asked.place])
        mean = np.broadcast_to(case.value.mean(0), (len(asked), case.value.shape[1])).copy()
        scale = np.broadcast_to(case.value.std(0), mean.shape).copy()
        found = asked >= 0
        for channel, value in enumerate(case.value.T):
            series = np.full((len(place), case.frames), np.nan)
            series[row.ravel(), case.known.frame] = value
            means, scales = self.continued(series, int(ahead.max()) + 1)
            mean[found, channel] = means[asked[found], ahead[found]]
            scale[found, channel] = scales[asked[found], ahead[found]]
        return mean, scale
