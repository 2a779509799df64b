/* The request of csrc/cpu.c for AMX tiles, and its reaction to Linux's answer. A seccomp filter passes the system call
 * to a signal handler, which answers as a sandbox or a kernel before 5.16 would. Each answer is tested in a process of
 * its own, since a process requests the permission once. */
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

static volatile sig_atomic_t n_requests, answer;

static void answer_call(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    (void)number;
    n_requests += info->si_syscall == SYS_arch_prctl && registers[REG_RDI] == REQUEST_PERMISSION &&
                  registers[REG_RSI] == TILE_DATA;
    registers[REG_RAX] = answer;
}

static void intercept_calls(void) {
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog filter = {sizeof program / sizeof *program, program};
    struct sigaction action = {.sa_sigaction = answer_call, .sa_flags = SA_SIGINFO};
    CHECK(sigaction(SIGSYS, &action, NULL) == 0, "sigaction failed");
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS failed");
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0, "PR_SET_SECCOMP failed");
}

static void check_answer(int system_answer, bool granted) {
    int status;
    const pid_t child = fork();
    CHECK(child >= 0, "fork failed");
    if (child == 0) {
        answer = system_answer;
        intercept_calls();
        for (int i = 0; i < 2; i++) {
            CHECK(phi_cpu_request_tiles() == granted, "phi_cpu_request_tiles returned %d for the answer %d", !granted,
                  system_answer);
            CHECK(n_requests == 1, "the permission was requested %d times, expected once", (int)n_requests);
        }
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child process for the answer %d failed",
          system_answer);
}

int main(void) {
    check_answer(0, true);
    check_answer(-EPERM, false);
    check_answer(-EINVAL, false);
    printf("ok  request tiles  %zu checks\n", n_checks);
    return 0;
}
