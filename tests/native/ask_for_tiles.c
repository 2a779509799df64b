/* What csrc/cpu.c asks Linux for, and that it takes the answer, by a filter that hands the call to us: such a refusal
 * is what sandboxes and kernels before 5.16 give. A process asks once, so each answer has a process of its own. */
#define _GNU_SOURCE /* REG_RAX */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "check.h"
#include "cpu.h"

enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* Linux, Documentation/arch/x86/xstate.rst */

static volatile sig_atomic_t n_asked, answer;

static void take_call(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)number;
    n_asked += info->si_syscall == SYS_arch_prctl && registers[REG_RDI] == REQUEST_PERMISSION &&
               registers[REG_RSI] == TILE_DATA;
    registers[REG_RAX] = answer;
}

static void hand_calls_to_us(void) {
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog filter = {sizeof program / sizeof *program, program};
    struct sigaction action = {.sa_sigaction = take_call, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSYS, &action, NULL) == 0, "no handler");
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no promise to gain no privileges");
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0, "no filter");
}

static void check_answer(int given, bool granted) {
    int status;
    const pid_t child = fork();
    CHECK(child >= 0, "no fork");
    if (child == 0) {
        answer = given;
        hand_calls_to_us();
        for (int i = 0; i < 2; i++) {
            CHECK(phi_cpu_request_tiles() == granted, "the answer %d was not heeded", given);
            CHECK(n_asked == 1, "the system was asked %d times", (int)n_asked);
        }
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the answer %d", given);
}

int main(void) {
    check_answer(0, true);
    check_answer(-EPERM, false);
    check_answer(-EINVAL, false);
    printf("ok  ask for tiles  %zu checks\n", n_checks);
    return 0;
}
