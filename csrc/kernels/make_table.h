// One instruction set's table, of the algorithms that are written once and the parts that it supplies.
//
// Include this inside a kernel file's target region, after all of them. Like them it has internal linkage, and its
// arguments are the file's own types, so that no two files can share a function; and it is a constant: nothing runs
// before main, where a CPU might lack the instructions.

namespace bitnet_ops {
namespace {

template <class Isa, class Tiles>
void tile_product(const TernaryProduct& product, int64_t tile_begin, int64_t tile_end) {
  if constexpr (Tiles::kDecodedRows > 0) {
    using Decoded = DecodedDriver<Isa, Tiles>;
    if (Decoded::suits(product)) return Decoded::ternary_product(product, tile_begin, tile_end);
  }
  TernaryDriver<Isa, Tiles>::ternary_product(product, tile_begin, tile_end);
}

// Isa: floats. Tiles, Sparse: the inner loops of layout tile16, and of layouts row and column. Sums: tile_sums.h.
template <class Isa, class Tiles, class Sparse, class Sums>
constexpr KernelTable make_table(const char* isa, decltype(KernelTable::ternary_product_base3) base3 = nullptr) {
  using Float = FloatKernels<Isa>;
  using Attend = AttentionKernels<Isa, Sums>;
  KernelTable table{};
  table.isa = isa;
  table.quantize_row = Float::quantize_row;
  table.quantize_row_16 = Float::quantize_row_16;
  table.ternary_product = tile_product<Isa, Tiles>;
  table.ternary_product_base3 = base3;
  table.ternary_rows = RowDriver<Sparse>::ternary_rows;
  table.ternary_columns = ColumnDriver<Isa, Sparse>::ternary_columns;
  table.rms_norm_row = Float::rms_norm_row;
  table.widen_row = Float::widen_row;
  table.logits = Float::logits;
  table.attention_store = Attend::store;
  table.attention_queries = Attend::queries;
  table.attention_span = Attend::span;
  table.attention_join = Attend::join;
  table.attention_finish = Attend::finish;
  table.logits_of_rows = Float::logits_of_rows;
  table.screen_rows = ScreenRows<Isa>::screen_rows;
  table.screen = ScreenDriver<Isa, Sums>::screen;
  table.glu_row = GluKernels<Isa>::row;
  return table;
}

}  // namespace
}  // namespace bitnet_ops
