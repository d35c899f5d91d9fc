"""The parts of `compress.quantize`: which places are int8 (`places`), ranges (`ranges`) of calibration data
(`batches`), torchao's flow (`pt2e`), its result (`converted`), what int8 costs (`errors`), and ways to make it cost
less (`equalize`, `rounding`, `training`)."""
