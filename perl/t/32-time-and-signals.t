use strict;
use warnings;

use POSIX ();
use Socket qw(AF_UNIX SOCK_STREAM sockaddr_un);
use Test::More;
use Time::HiRes ();

use lib 't/lib';
use CPANBridge;
use CPANBridge::Clock;
use FakeDaemon;

sub bridge_to {
    my ($serve, %options) = @_;
    my $daemon = FakeDaemon->start($serve);
    return ($daemon, CPANBridge->new(socket => $daemon->path, %options));
}

# The seconds that the code takes.
sub seconds {
    my ($code) = @_;
    my $begin = CPANBridge::Clock::now();
    $code->();
    return CPANBridge::Clock::now() - $begin;
}

# On a busy machine it may be late, but never early.
sub took_half_a_second {
    my ($took, $name) = @_;
    ok($took > 0.45 && $took < 3, "$name ($took s)");
    return;
}

my $silent_once = sub {
    my ($connection, $number) = @_;
    return $connection->echo if $number > 1;
    $connection->wait_for_end;
};

subtest 'a daemon that does not answer' => sub {
    my ($daemon, $bridge) = bridge_to($silent_once, timeout => 0.5);
    my $result;
    took_half_a_second(seconds(sub { $result = $bridge->call_python('m', 'f') }), 'the timeout holds');
    is($result->{error_type}, 'RequestTimeout', 'error_type');
    like($result->{error}, qr/no reply within 0\.5 s; the call may have run/, 'the message');
    $bridge->set_timeout(30);
    is_deeply($bridge->call_python('m', 'f', [1]), [1], 'the next call has a new connection');
};

subtest 'a request that is not ready in time' => sub {
    { package Slow; sub TO_JSON { Time::HiRes::sleep(0.1); return 1 } }
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo }, timeout => 0.05);
    my $result = $bridge->call_python('m', 'slow', [ bless {}, 'Slow' ]);
    is($result->{error_type}, 'RequestTimeout', 'error_type');
    like($result->{error}, qr/the call was not sent/, 'the message');
    is_deeply($bridge->set_timeout(30)->call_python('m', 'f', [1]), [1], 'the next call works');
    is(scalar(grep { $_ eq 'request slow' } $daemon->noted), 0, '... and that one never arrives');
};

subtest "the daemon's word that the time is over" => sub {
    my $reason = 'The call was not run: it waited 3.0 s for limits.max_requests_per_minute';
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            return $connection->echo if $number > 1;
            my $request = $connection->read_request;
            Time::HiRes::sleep($request->{timeout} + 0.05);
            $connection->fail($request, error => $reason, error_type => 'RequestTimeout', retry_after => 2);
            $connection->no_more_requests;
        },
        timeout => 3,
    );
    my @results = $bridge->call_many([ [ 'm', 'first' ], [ 'm', 'second' ] ]);
    is($results[0]{error}, $reason, 'is waited for');
    is_deeply([ @{ $results[0] }{qw(error_type retry_after)} ], [ 'RequestTimeout', 2 ], '... and has its type, and when to try again');
    is($results[1]{error_type}, 'RequestTimeout', 'a call after it');
    like($results[1]{error}, qr/\Am\.second: the call was not run within 3 s/, '... was not run');
    is(scalar(grep { $_ eq 'request second' } $daemon->noted), 0, '... nor sent again when it was too late');
    is_deeply($bridge->set_timeout(30)->call_python('m', 'f', [1]), [1], 'the next call works');
};

subtest 'a reply that has come while a signal handler took its time' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            while (1) {
                my $request = $connection->read_request;
                Time::HiRes::sleep(0.1);
                $connection->reply($request);
                $connection->note('replied');
            }
        },
        timeout => 0.5,
    );
    local $SIG{ALRM} = sub {
        $daemon->wait_until_noted('replied');
        CPANBridge::Clock::pause_until(CPANBridge::Clock::now() + 1);
    };
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0.05);
    is_deeply($bridge->call_python('m', 'f', [1]), [1], 'is taken');
    is_deeply($bridge->call_python('m', 'f', [2]), [2], '... and the connection goes on');
};

subtest 'a daemon that answers in drops' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->send_bytes(pack 'N', 10_000_000);
            $connection->send_bytes('x') while 1;
        },
        timeout => 0.5,
    );
    took_half_a_second(seconds(sub { $bridge->call_python('m', 'f') }), 'gains no time');
};

subtest 'a daemon that does not read' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub { my ($connection) = @_; $connection->read_bytes(1); Time::HiRes::sleep(20) },
        timeout => 0.5,
    );
    my $result;
    took_half_a_second(seconds(sub { $result = $bridge->call_python('m', 'f', 'x' x 5_000_000) }), 'gains no time');
    like($result->{error}, qr/the call was not sent/, 'half a request cannot have run');
};

subtest 'a daemon that does not accept' => sub {
    my $folder = File::Temp->newdir;
    my $path   = "$folder/full.sock";
    socket my $listening, AF_UNIX, SOCK_STREAM, 0 or die $!;
    bind $listening, sockaddr_un($path) or die $!;
    listen $listening, 0;
    my @waiting;
    while (1) {
        socket my $client, AF_UNIX, SOCK_STREAM, 0 or die $!;
        fcntl $client, Fcntl::F_SETFL(), Fcntl::O_NONBLOCK();
        connect $client, sockaddr_un($path) or last;
        push @waiting, $client;
    }
    my $bridge = CPANBridge->new(socket => $path, timeout => 0.5);
    my $result;
    took_half_a_second(seconds(sub { $result = $bridge->call_python('m', 'f') }), 'with a full backlog, the timeout holds');
    is($result->{error_type}, 'RequestTimeout', 'error_type');
    like($result->{error}, qr/too busy/, 'the message');
    ok(-e $path && $result->{error} !~ /not running/, 'that is not the same as a daemon that is absent');
};

subtest 'signals do not shorten a call' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            my $request = $connection->read_request;
            Time::HiRes::sleep(0.5);
            $connection->reply($request);
            $connection->wait_for_end;
        },
        timeout => 30,
    );
    my $signals = 0;
    local $SIG{ALRM} = sub { $signals++ };
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0.01, 0.01);
    my $result = $bridge->call_python('m', 'f', [ 'x' x 500_000 ]);
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0);
    is(ref $result, 'ARRAY', 'a storm of them');
    cmp_ok($signals, '>', 3, "... and the script's handler ran ($signals times)");

    ($daemon, $bridge) = bridge_to($silent_once, timeout => 0.5);
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0.01, 0.01);
    my $took = seconds(sub { $bridge->call_python('m', 'f') });
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0);
    took_half_a_second($took, '... nor do they make it longer');
};

subtest "a handler's die reaches the script" => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            return $connection->echo if $number > 1;
            $connection->reply($connection->read_request);
            $connection->wait_for_end;
        },
        timeout => 30,
    );
    is_deeply($bridge->call_python('m', 'f', [0]), [0], 'a connection is kept');
    local $SIG{ALRM} = sub { die "enough\n" };
    my $outcome = eval {
        alarm 1;
        $bridge->call_python('m', 'f');
        1;
    };
    my $error = $@;
    alarm 0;
    ok(!$outcome, 'the call was left');
    is($error, "enough\n", 'with what the handler said');
    is_deeply($bridge->call_python('m', 'g', [1]), [1], 'and the object can be used again');
};

subtest "the script's __DIE__ handler" => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            $connection->reply($connection->read_request);
            $connection->wait_for_end;
        },
        timeout => 30,
    );
    my @seen;
    local $SIG{__DIE__} = sub { push @seen, $_[0] };
    $bridge->call_python('m', 'f', [ sub { } ]);
    is_deeply(\@seen, [], 'is not called for exceptions that the bridge catches');
    is_deeply($bridge->call_python('m', 'f', [0]), [0], 'a connection is kept');
    local $SIG{ALRM} = sub { die "enough\n" };
    eval { alarm 1; $bridge->call_python('m', 'f') };
    alarm 0;
    # Perl itself calls the handler once or twice.
    ok(@seen && !grep({ $_ ne "enough\n" } @seen), "but of a signal handler's die during a call");
};

subtest 'a handler may use the bridge itself' => sub {
    my ($daemon, $bridge) = bridge_to($silent_once, timeout => 1);
    my $nested;
    my $pid = $$;
    local $SIG{ALRM} = sub { $nested = $bridge->call_python('m', 'nested', ['inside']) };
    Time::HiRes::setitimer(Time::HiRes::ITIMER_REAL(), 0.2);
    # The fake daemon serves one connection at a time: the nested call waits until its end.
    my $result = $bridge->call_python('m', 'outer');
    is($result->{error_type}, 'RequestTimeout', 'the outer call is not disturbed');
    ok(defined $nested, 'the nested call has an outcome of its own');
    $bridge->set_timeout(30);
    is_deeply($bridge->call_python('m', 'f', [1]), [1], 'and the object can be used again');
};

subtest 'a daemon that leaves causes no SIGPIPE' => sub {
    for my $handler ('DEFAULT', 'IGNORE', sub { die 'SIGPIPE' }) {
        my ($daemon, $bridge) = bridge_to(sub { my ($connection, $number) = @_; $connection->echo if $number > 1 },
            timeout => 30);
        local $SIG{PIPE} = $handler;
        my $result = $bridge->call_python('m', 'f', [ 'x' x 5_000_000 ]);
        is(ref $result, 'ARRAY', "... with $handler: and the request, sent in part, is sent again");
        is($SIG{PIPE}, $handler, '... and the handler is left alone');
    }
};

done_testing;
