/*
 * A plugin of QEMU's TCG: how many instructions all processors of a machine have executed, as eight bytes of a file that
 * whoever wants to know maps. A block of instructions counts when it begins, so one that a fault cuts short counts whole.
 *
 *     -plugin file=./count.so,to=FILE
 *
 * The declarations are those of QEMU's API for plugins (docs/devel/tcg-plugins.rst), which Debian has no header of.
 */

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API_VERSION 2 /* the first with counters of each processor; newer QEMUs take it */
#define EXPORT __attribute__((visibility("default")))
#define PERIOD_NS 2000000

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_scoreboard;
typedef struct {
    struct qemu_plugin_scoreboard *score;
    size_t offset;
} qemu_plugin_u64;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

extern struct qemu_plugin_scoreboard *qemu_plugin_scoreboard_new(size_t element_size);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id,
                                                  void (*cb)(qemu_plugin_id_t id, struct qemu_plugin_tb *tb));
extern void qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(struct qemu_plugin_tb *tb, enum qemu_plugin_op op,
                                                              qemu_plugin_u64 entry, uint64_t imm);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
extern uint64_t qemu_plugin_u64_sum(qemu_plugin_u64 entry);

EXPORT int qemu_plugin_version = API_VERSION;

static qemu_plugin_u64 executed;
static volatile uint64_t *shared;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, QEMU_PLUGIN_INLINE_ADD_U64, executed,
                                                      qemu_plugin_tb_n_insns(tb));
}

static void *tell(void *unused)
{
    struct timespec pause = {.tv_nsec = PERIOD_NS};

    (void)unused;
    for (;;) {
        *shared = qemu_plugin_u64_sum(executed);
        nanosleep(&pause, NULL);
    }
    return NULL;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    pthread_t thread;
    int file;
    void *page;

    (void)info;
    if (argc != 1 || strncmp(argv[0], "to=", 3) != 0)
        return -1;
    file = open(argv[0] + 3, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, sizeof(uint64_t)) != 0)
        return -1;
    page = mmap(NULL, sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (page == MAP_FAILED)
        return -1;
    shared = page;
    executed.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return pthread_create(&thread, NULL, tell, NULL) == 0 ? 0 : -1;
}
