from sinks.reading.estimate import Estimate, estimate, exponential, ratio_of_means
