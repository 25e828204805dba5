use strict;
use warnings;

use POSIX ();
use Test::More;

use lib 't/lib';
use CPANBridge;
use CPANBridge::Clock;
use LiveDaemon;

plan skip_all => 'no cpanbridged in CPANBRIDGED or PATH' if !LiveDaemon->executable;

my $daemon = LiveDaemon->start(probe => <<'END');
import os
import time

class OwnError(Exception):
    pass

def fail(kind):
    if kind == "own":
        raise OwnError("of our own")
    return {}["missing"]

def pid():
    return os.getpid()

def mark_and_wait(path, seconds):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return "done"
END
my $bridge = $daemon->bridge;

# Waits until a call of mark_and_wait runs; returns the workers that ran it.
sub running {
    my ($path) = @_;
    my $until = CPANBridge::Clock::now() + 30;
    while (CPANBridge::Clock::now() < $until) {
        if (open my $file, '<', $path) {
            my @pids = <$file>;
            chomp @pids;
            return @pids if @pids;
        }
        CPANBridge::Clock::pause_until(CPANBridge::Clock::now() + 0.02);
    }
    return;
}

subtest 'calls' => sub {
    ok($bridge->test_python_bridge, 'test_python_bridge');
    is($bridge->call_python('stats', 'mean', [ [ 1, 2, 3, 4 ] ]), 2.5, 'a function of a library');
    is(ref $bridge->call_python('system', 'info'), 'HASH', 'system.info');
    $bridge->call('test', 'echo', [$_]) for 1 .. 500;
    is($bridge->get_performance_stats->{reconnects}, 0, 'hundreds of them, on one connection');
};

subtest 'errors' => sub {
    my %expected = (
        ModuleNotAllowed   => [ 'nosuch', 'f' ],
        FunctionNotAllowed => [ 'stats',  'median' ],
        InvalidParams      => [ 'probe',  'pid', [ 1, 2, 3 ] ],
        OwnError           => [ 'probe',  'fail', ['own'] ],
        KeyError           => [ 'probe',  'fail', ['key'] ],
        InvalidRequest     => [ 'no-name', 'f' ],
    );
    for my $type (sort keys %expected) {
        my $result = $bridge->call_python(@{ $expected{$type} });
        is($result->{error_type}, $type, $type);
    }
    like($bridge->call_python('probe', 'fail', ['own'])->{error}, qr/\AError in probe\.fail: of our own/, 'the message');
    is(eval { $bridge->call('probe', 'fail', ['own']) }, undef, 'call dies');
    is($@->error_type, 'OwnError', '... with the same');
};

subtest 'call_many' => sub {
    my @results = $bridge->call_many([ map { [ 'test', 'echo', [$_] ] } 1 .. 2000 ]);
    is_deeply(\@results, [ map { [$_] } 1 .. 2000 ], 'two thousand');
    my $text = 'x' x 100_000;
    @results = $bridge->call_many([ map { [ 'test', 'echo', [ $_, $text ] ] } 1 .. 300 ]);
    is(scalar(grep { ref eq 'ARRAY' && $_->[1] eq $text } @results), 300, 'with 100 KB each');
    @results = $bridge->call_many([ [ 'stats', 'mean', [ [1] ] ], [ 'no', 'no' ], [ 'probe', 'fail', ['own'] ], [ 'test', 'echo', 5 ] ]);
    is_deeply([ map { ref eq 'HASH' ? $_->{error_type} : $_ } @results ], [ 1, 'ModuleNotAllowed', 'OwnError', 5 ],
        'errors among them');
};

subtest 'a timeout' => sub {
    my $hasty  = $daemon->bridge(timeout => 0.5);
    my $begin  = CPANBridge::Clock::now();
    my $result = $hasty->call_python('probe', 'mark_and_wait', [ $daemon->folder . '/slow', 3 ]);
    is($result->{error_type}, 'RequestTimeout', 'error_type');
    cmp_ok(CPANBridge::Clock::now() - $begin, '<', 2.5, 'in time');
    is($hasty->set_timeout(30)->call_python('test', 'echo', 'x'), 'x', 'the next call works');
};

subtest 'a call whose time is over while it waits for the rate' => sub {
    my $limited = LiveDaemon->start(-limits => 'max_requests_per_minute = 3');
    $limited->bridge->call('test', 'echo', $_) for 1 .. 3;
    my $result = $limited->bridge(timeout => 3)->call_python('test', 'echo', 4);
    is($result->{error_type}, 'RequestTimeout', 'error_type');
    like($result->{error}, qr/not run: it waited [0-9.]+ s for .*limits\.max_requests_per_minute/, 'why');
    ok($limited->bridge(timeout => 10)->test_python_bridge, '... while the daemon answers a ping');
};

subtest 'processes' => sub {
    $bridge->test_python_bridge;
    my @children;
    for my $child (1 .. 4) {
        defined(my $pid = fork) or die $!;
        if (!$pid) {
            my $good = grep { my $sent = "$child-$_"; $bridge->call_python('test', 'echo', $sent) eq $sent } 1 .. 200;
            POSIX::_exit($good == 200 ? 0 : 1);
        }
        push @children, $pid;
    }
    my $good = grep { $bridge->call_python('test', 'echo', "parent-$_") eq "parent-$_" } 1 .. 200;
    is($good, 200, 'a parent');
    for my $pid (@children) {
        waitpid $pid, 0;
        is($?, 0, '... and its child share a bridge, and each gets its own replies');
    }
};

subtest 'a worker that is killed during a call' => sub {
    my $marks = $daemon->folder . '/marks';
    defined(my $killer = fork) or die $!;
    if (!$killer) {
        my ($worker) = running($marks);
        kill 'KILL', $worker if $worker;
        POSIX::_exit(0);
    }
    my $result = $bridge->call_python('probe', 'mark_and_wait', [ $marks, 20 ]);
    waitpid $killer, 0;
    is($result->{error_type}, 'WorkerLost', 'error_type');
    my $until = CPANBridge::Clock::now() + 30;
    my $pid;
    while (CPANBridge::Clock::now() < $until && !$pid) {
        $pid = $bridge->call_python('probe', 'pid');
        undef $pid if ref $pid;    # a module's state was lost: the first call after that gets the error
    }
    ok($pid, 'later calls are answered');
    my @ran = running($marks);
    is(scalar @ran, 1, 'the call was run exactly once');
    isnt($pid, $ran[0], '... by the worker that is gone');
};

subtest 'a daemon that is restarted between two calls' => sub {
    is($bridge->call_python('test', 'echo', 'before'), 'before', 'before');
    $daemon->stop;
    my $absent = $daemon->bridge(retry_count => 0)->call_python('test', 'ping');
    is($absent->{error_type}, 'DaemonNotRunning', 'it is gone');
    $daemon->run;
    is($bridge->call_python('test', 'echo', 'after'), 'after', 'after');
};

done_testing;
