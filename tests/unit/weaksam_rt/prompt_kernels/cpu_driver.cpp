// The part of NVIDIA's driver that weaksam_rt.prompt_clustering calls, on a CPU: memory is the
// host's, a launch runs the kernel of that name at once. What it shows: that the calls have the
// right arguments in the right order, and that every address and size is right.
#include "cpu_kernels.cpp"

#include <map>
#include <string>

namespace {

constexpr int success = 0, invalid_value = 1, out_of_memory = 2, invalid_device = 101,
              invalid_image = 200, invalid_context = 201, not_found = 500;
constexpr std::size_t memory_bytes = std::size_t{1} << 30;

struct RecordedLaunch {
    const char* name;
    unsigned int grid_x, grid_y, block_x, shared_bytes;
    void** arguments;  // the caller keeps what they point to, as long as the graph may run
};
using Graph = std::vector<RecordedLaunch>;

int context, module_of_driver;
char streams[64];  // their addresses are the handles
int num_streams = 0;
int num_contexts = 0;
bool is_capturing = false;
Graph captured;
using Allocations = std::map<std::uintptr_t, std::size_t>;
Allocations allocations, pinned;

bool lies_in(const Allocations& known, std::uintptr_t address, std::size_t bytes) {
    auto next = known.upper_bound(address);
    if (next == known.begin()) return false;
    --next;
    return address + bytes <= next->first + next->second;
}

bool is_allocated(std::uintptr_t address, std::size_t bytes) {
    return lies_in(allocations, address, bytes);
}

bool is_ours(const void* stream) {
    return stream >= streams && stream < streams + num_streams;
}

int run(const RecordedLaunch& launch) {
    return launch_kernel(launch.name, launch.grid_x, launch.grid_y, launch.block_x,
                         launch.shared_bytes, launch.arguments) == 0
               ? success
               : not_found;
}

}  // namespace

extern "C" {

int refused_images = 0;  // so many of the next modules are refused
int num_waits = 0;
int num_launches = 0, num_graph_launches = 0, num_graphs = 0;
int num_copies_out = 0, num_bytes_out = 0;

int cuInit(unsigned int flags) { return flags == 0 ? success : invalid_value; }

int cuGetErrorString(int status, const char** text) {
    static std::string message;
    message = "status " + std::to_string(status);
    *text = message.c_str();
    return success;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = 40 + ordinal;
    return ordinal == 0 ? success : invalid_device;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device != 40 || (attribute != 75 && attribute != 76)) return invalid_value;
    *value = attribute == 75 ? 9 : 0;
    return success;
}

int cuDevicePrimaryCtxRetain(void** out, int device) {
    *out = &context;
    return device == 40 ? success : invalid_device;
}

int cuCtxPushCurrent_v2(void* pushed) {
    ++num_contexts;
    return pushed == &context ? success : invalid_value;
}

int cuCtxPopCurrent_v2(void** popped) {
    *popped = &context;
    return --num_contexts >= 0 ? success : invalid_value;
}

int cuCtxGetDevice(int* device) {
    *device = 40;
    return num_contexts > 0 ? success : invalid_context;
}

int cuModuleLoadData(void** module, const void* image) {
    const char* bytes = static_cast<const char*>(image);
    const bool is_elf = std::memcmp(bytes, "\x7f" "ELF", 4) == 0;
    const bool is_ptx = !is_elf && std::strstr(bytes, ".version") != nullptr;
    if (refused_images > 0) return --refused_images, invalid_image;
    *module = &module_of_driver;
    return num_contexts > 0 && (is_elf || is_ptx) ? success : invalid_image;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (module != &module_of_driver) return invalid_value;
    for (const Entry& entry : entries)
        if (std::strcmp(entry.name, name) == 0) {
            *function = const_cast<char*>(entry.name);
            return success;
        }
    return not_found;
}

int cuFuncSetAttribute(void*, int attribute, int bytes) {
    return attribute == 8 && bytes > 0 && bytes <= 99 * 1024 ? success : invalid_value;
}

int cuStreamCreate(void** stream, unsigned int flags) {
    *stream = &streams[num_streams];
    num_streams = std::min(num_streams + 1, static_cast<int>(sizeof streams) - 1);
    return flags == 1 ? success : invalid_value;
}

int cuStreamSynchronize(void* stream) {
    return is_ours(stream) && !is_capturing ? success : invalid_value;
}

int cuEventCreate(void** event, unsigned int flags) {
    *event = &num_waits;
    return flags == 2 ? success : invalid_value;
}

int cuEventRecord(void* event, void* stream) {
    return event == &num_waits && stream != nullptr ? success : invalid_value;
}

int cuStreamWaitEvent(void* stream, void* event, unsigned int flags) {
    ++num_waits;
    return is_ours(stream) && event == &num_waits && flags == 0 ? success : invalid_value;
}

int cuEventDestroy_v2(void* event) { return event == &num_waits ? success : invalid_value; }

int cuPointerGetAttribute(void* data, int attribute, std::uintptr_t address) {
    if (attribute != 9 || address == 0) return invalid_value;
    *static_cast<int*>(data) = 0;
    return success;
}

int cuMemAlloc_v2(std::uintptr_t* address, std::size_t bytes) {
    if (bytes > memory_bytes) return out_of_memory;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xa5, bytes);
    *address = reinterpret_cast<std::uintptr_t>(memory);
    allocations[*address] = bytes;
    return success;
}

int cuMemFree_v2(std::uintptr_t address) {
    if (allocations.erase(address) == 0) return invalid_value;
    std::free(reinterpret_cast<void*>(address));
    return success;
}

int cuMemAllocHost_v2(std::uintptr_t* address, std::size_t bytes) {
    if (bytes > memory_bytes) return out_of_memory;
    void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(memory, 0xa5, bytes);
    *address = reinterpret_cast<std::uintptr_t>(memory);
    pinned[*address] = bytes;
    return success;
}

int cuMemFreeHost(std::uintptr_t address) {
    if (pinned.erase(address) == 0) return invalid_value;
    std::free(reinterpret_cast<void*>(address));
    return success;
}

int cuMemcpyHtoDAsync_v2(std::uintptr_t target, const void* source, std::size_t bytes,
                         void* stream) {
    if (!is_ours(stream) || !is_allocated(target, bytes)) return invalid_value;
    std::memcpy(reinterpret_cast<void*>(target), source, bytes);
    return success;
}

int cuMemcpyDtoHAsync_v2(void* target, std::uintptr_t source, std::size_t bytes, void* stream) {
    // A copy to pageable memory would make the host wait.
    if (!is_ours(stream) || !is_allocated(source, bytes) ||
        !lies_in(pinned, reinterpret_cast<std::uintptr_t>(target), bytes))
        return invalid_value;
    ++num_copies_out;
    num_bytes_out += static_cast<int>(bytes);
    std::memcpy(target, reinterpret_cast<const void*>(source), bytes);
    return success;
}

int cuMemcpyDtoDAsync_v2(std::uintptr_t target, std::uintptr_t source, std::size_t bytes,
                         void* stream) {
    if (!is_ours(stream) || !is_allocated(target, bytes)) return invalid_value;
    std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes);
    return success;
}

int cuLaunchKernel(void* function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                   unsigned int block_x, unsigned int block_y, unsigned int block_z,
                   unsigned int shared_bytes, void* stream, void** arguments, void** extra) {
    const bool is_flat = grid_z == 1 && block_y == 1 && block_z == 1 && grid_y <= 65535;
    if (!is_flat || grid_x == 0 || block_x == 0 || block_x > 1024 || extra != nullptr ||
        !is_ours(stream))
        return invalid_value;
    const RecordedLaunch launch = {static_cast<const char*>(function), grid_x, grid_y, block_x,
                                   shared_bytes, arguments};
    if (!is_capturing) return ++num_launches, run(launch);
    captured.push_back(launch);
    return success;
}

int cuStreamBeginCapture_v2(void* stream, int mode) {
    is_capturing = true;
    captured.clear();
    return is_ours(stream) && mode == 1 ? success : invalid_value;
}

int cuStreamEndCapture(void* stream, void** graph) {
    if (!is_ours(stream) || !is_capturing) return invalid_value;
    is_capturing = false;
    *graph = new Graph(captured);
    return success;
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) {
    *executable = new Graph(*static_cast<Graph*>(graph));
    ++num_graphs;
    return flags == 0 ? success : invalid_value;
}

int cuGraphLaunch(void* executable, void* stream) {
    if (!is_ours(stream)) return invalid_value;
    ++num_graph_launches;
    for (const RecordedLaunch& launch : *static_cast<Graph*>(executable))
        if (const int status = run(launch); status != success) return status;
    return success;
}

int cuGraphDestroy(void* graph) {
    delete static_cast<Graph*>(graph);
    return success;
}

int cuGraphExecDestroy(void* executable) {
    --num_graphs;
    return cuGraphDestroy(executable);
}

}  // extern "C"
