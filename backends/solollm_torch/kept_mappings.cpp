// The CPU allocator of a training process: large tensors lie in mappings of their own, which are
// kept when a tensor dies and given to the next one of the same size. See kept_mappings.py.
//
// Living and kept mappings together take at most a quarter more than living tensors asked for at
// their peak. A quarter is more than the sizes of one block need that are never alive at the same
// time, so that a training step maps nothing new. Where a new mapping would pass that, the tensor
// gets the smallest kept one that is larger, so that rows of varying length map nothing new either;
// where there is none, kept ones are given back to the system first.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kSmallest = 1 << 20;  // below it the C library does well
constexpr size_t kShareKept = 4;       // of the peak, a fourth

class KeptMappings final : public c10::Allocator {
 public:
  explicit KeptMappings(c10::Allocator* others) : others_(others) {}

  c10::DataPtr allocate(size_t num_bytes) override {
    if (num_bytes < kSmallest) return others_->allocate(num_bytes);
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* data = take((num_bytes + page - 1) / page * page);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t num_bytes) const override {
    default_copy_data(target, source, num_bytes);
  }

  void give_back_kept() {
    const std::lock_guard<std::mutex> guard(mutex_);
    give_back(kept_bytes_);
    most_ = asked_bytes_;
  }

  c10::Allocator* others() const { return others_; }

  uint64_t mapped_bytes() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return mapped_bytes_;
  }

  static void release(void* data);

 private:
  struct Living {
    size_t size, asked;
  };

  void* take(size_t asked) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (asked_bytes_ + asked > most_) most_ = asked_bytes_ + asked;
    const size_t most = most_ + most_ / kShareKept;
    const auto found = kept_.lower_bound(asked);
    const bool full = living_bytes_ + kept_bytes_ + asked > most;
    void* data = nullptr;
    size_t size = asked;
    if (found != kept_.end() && (found->first == asked || full)) {
      size = found->first;
      data = found->second;
      kept_.erase(found);
      kept_bytes_ -= size;
    } else {
      if (full) give_back(living_bytes_ + kept_bytes_ + asked - most);
      data = map(asked);
    }
    asked_bytes_ += asked;
    living_bytes_ += size;
    living_.emplace(data, Living{size, asked});
    return data;
  }

  // False for what is not a mapping of ours.
  bool put(void* data) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = living_.find(data);
    if (found == living_.end()) return false;
    const auto [size, asked] = found->second;
    living_.erase(found);
    asked_bytes_ -= asked;
    living_bytes_ -= size;
    kept_bytes_ += size;
    kept_.emplace(size, data);
    return true;
  }

  void* map(size_t size) {
    void* data = try_to_map(size);
    if (data == MAP_FAILED) {
      give_back(kept_bytes_);
      data = try_to_map(size);
    }
    // In the words of PyTorch's own allocator, by which callers know what has happened.
    TORCH_CHECK(data != MAP_FAILED, "can't allocate memory: you tried to allocate ", size, " bytes");
    mapped_bytes_ += size;
    return data;
  }

  static void* try_to_map(size_t size) {
    return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  // At least so many bytes of what is kept: the one mapping that suffices, else the largest first.
  void give_back(size_t num_bytes) {
    size_t given = 0;
    while (given < num_bytes && !kept_.empty()) {
      auto chosen = kept_.lower_bound(num_bytes - given);
      if (chosen == kept_.end()) --chosen;
      munmap(chosen->second, chosen->first);
      given += chosen->first;
      kept_bytes_ -= chosen->first;
      kept_.erase(chosen);
    }
  }

  c10::Allocator* others_;
  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;  // by size
  std::unordered_map<void*, Living> living_;
  size_t asked_bytes_ = 0, living_bytes_ = 0, kept_bytes_ = 0, most_ = 0, mapped_bytes_ = 0;
};

KeptMappings* installed = nullptr;  // never destroyed: tensors may outlive everything else

void KeptMappings::release(void* data) {
  if (!installed->put(data)) installed->others_->raw_deleter()(data);
}

}  // namespace

extern "C" {

// Whether every new tensor on the CPU comes from here, or from PyTorch's own allocator.
void use_kept_mappings(int use) {
  if (installed == nullptr) installed = new KeptMappings(c10::GetCPUAllocator());
  c10::SetCPUAllocator(use ? installed : installed->others(), 1);
}

void give_back_kept_mappings() {
  if (installed != nullptr) installed->give_back_kept();
}

// Asked of the system so far: the second of two equal steps asks for little.
uint64_t kept_mappings_mapped_bytes() {
  return installed == nullptr ? 0 : installed->mapped_bytes();
}
}
