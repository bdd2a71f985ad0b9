#include "ops/decoder.h"

#include <map>
#include <memory>
#include <mutex>

#include "run/decoder.h"

namespace bitnet_ops {
namespace {

// Layers by number. They are checked again when their tensors have got other memory.
class Prepared {
 public:
  int64_t add(LayerTensors tensors) {
    auto layers = std::make_shared<const DecoderLayers>(tensors);
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace(++last_, Entry{std::move(tensors), std::move(layers)});
    return last_;
  }

  std::shared_ptr<const DecoderLayers> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(number);
    if (found == entries_.end()) {
      refuse("run_decoder_layers", "prepared", "a number from prepare_decoder_layers that has not been released",
             std::to_string(number));
    }
    Entry& entry = found->second;
    if (!entry.layers->is_current()) entry.layers = std::make_shared<const DecoderLayers>(entry.tensors);
    return entry.layers;
  }

  void remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.erase(number);
  }

 private:
  struct Entry {
    LayerTensors tensors;
    std::shared_ptr<const DecoderLayers> layers;
  };

  std::mutex mutex_;
  std::map<int64_t, Entry> entries_;
  int64_t last_ = 0;
};

// Never destroyed: at the end of the process, torch may be gone before its tensors.
Prepared& prepared_layers() {
  static Prepared* const all = new Prepared;
  return *all;
}

}  // namespace

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& norm_weight, double eps,
                      const std::vector<Tensor>& packed, const std::vector<Tensor>& weight_scale,
                      const std::vector<std::string>& layouts, const Tensor& cos, const Tensor& sin,
                      const Tensor& start, const Tensor& keys, const Tensor& values,
                      const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale) {
  const DecoderLayers layers({norm_weight, eps, packed, weight_scale, layouts});
  return layers.run(x, cos, sin, start, keys, values, key_scale, value_scale);
}

int64_t prepare_decoder_layers(const std::vector<Tensor>& norm_weight, double eps, const std::vector<Tensor>& packed,
                               const std::vector<Tensor>& weight_scale, const std::vector<std::string>& layouts) {
  return prepared_layers().add({norm_weight, eps, packed, weight_scale, layouts});
}

Tensor run_decoder_layers(const Tensor& x, int64_t prepared, const Tensor& cos, const Tensor& sin, const Tensor& start,
                          const Tensor& keys, const Tensor& values, const std::optional<Tensor>& key_scale,
                          const std::optional<Tensor>& value_scale) {
  return prepared_layers().find(prepared)->run(x, cos, sin, start, keys, values, key_scale, value_scale);
}

void release_decoder_layers(int64_t prepared) { prepared_layers().remove(prepared); }

}  // namespace bitnet_ops
