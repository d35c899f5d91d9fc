// How a rows × panels problem is divided among threads: by rows, which each read all weights, or by panels, which each read all rows.
#pragma once

#include "runtime.h"
#include "tile.h"

namespace kernelpress::KERNELPRESS_ISA {

// row_parts · panel_parts tasks, at most one per thread.
struct Split {
  int64_t row_parts, panel_parts;
};

// Least time of the slowest thread, in units of one row's FMAs with one panel: its share of them, the weights that it streams from
// the outer cache, and `row_cost` for what must be made of each of its rows first. Where rows are divided, each part computes
// `shared_rows` of its neighbours' too. `columns` of all panels, where the last one may be half empty.
inline Split split_work(int64_t rows, int64_t depth, int64_t panels, double row_cost = 0, int64_t shared_rows = 0, int64_t columns = 0) {
  constexpr double kStreamCost = 12;
  constexpr int64_t kInnerCacheBytes = 256 * 1024;
  const int64_t threads = thread_count(), weight_bytes = depth * panels * kPanel * static_cast<int64_t>(sizeof(float));
  const double stream = weight_bytes > kInnerCacheBytes ? kStreamCost : 0;
  Split best{1, 1};
  double best_cost = 0;
  for (int64_t panel_parts = 1; panel_parts <= minimum(threads, panels); ++panel_parts) {
    const int64_t row_parts = minimum(threads / panel_parts, rows);
    const double my_rows = static_cast<double>(ceil_div(rows, row_parts) + (row_parts > 1 ? shared_rows : 0));
    const double my_panels = panel_parts == 1 && columns ? static_cast<double>(ceil_div(columns, kLanes)) / 2
                                                         : static_cast<double>(ceil_div(panels, panel_parts));
    const double cost = my_panels * (my_rows + stream) + row_cost * my_rows;
    if (panel_parts == 1 || cost < best_cost) best = {row_parts, panel_parts}, best_cost = cost;
  }
  return best;
}

// Runs body(first_row, last_row, first_panel, last_panel) over the grid that `split` describes.
template <class Body>
void over_grid(const Split& split, int64_t rows, int64_t panels, const Body& body) {
  parallel(split.row_parts * split.panel_parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / split.panel_parts, j = task % split.panel_parts;
      body(rows * i / split.row_parts, rows * (i + 1) / split.row_parts, panels * j / split.panel_parts, panels * (j + 1) / split.panel_parts);
    }
  });
}

}  // namespace kernelpress::KERNELPRESS_ISA
