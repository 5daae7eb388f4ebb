// The kernels as a shared library for the CPU. Build: g++ -std=c++17 -shared -fPIC
// -ffp-contract=off.
#include "kernels.cu"

namespace {

#define KERNEL(name)                                             \
    {                                                            \
        #name, [](const cpu_execution::Geometry& geometry,       \
                  void** arguments) {                            \
            cpu_execution::launch(&name, geometry, arguments);   \
        }                                                        \
    }

struct Entry {
    const char* name;
    void (*launch)(const cpu_execution::Geometry&, void**);
};

const Entry entries[] = {
    KERNEL(axis_tables),   KERNEL(find_peaks),   KERNEL(cluster_peaks), KERNEL(choose_clusters),
    KERNEL(count_prompts), KERNEL(pack_prompts), KERNEL(nms_order),     KERNEL(nms_conflicts),
    KERNEL(nms_select),    KERNEL(summarize_masks), KERNEL(pack_masks),    KERNEL(count_runs),
    KERNEL(write_runs),    KERNEL(describe_image), KERNEL(count_outputs),
};

}  // namespace

// Runs a kernel to its end; 0, or 1 if there is none of this name.
extern "C" int launch_kernel(const char* name, unsigned int grid_x, unsigned int grid_y,
                             unsigned int block_x, std::size_t shared_bytes, void** arguments) {
    for (const Entry& entry : entries)
        if (std::strcmp(entry.name, name) == 0) {
            entry.launch({grid_x, grid_y, block_x, shared_bytes}, arguments);
            return 0;
        }
    return 1;
}
