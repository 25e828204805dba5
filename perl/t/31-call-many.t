use strict;
use warnings;

use Test::More;

use lib 't/lib';
use CPANBridge;
use FakeDaemon;

sub bridge_to {
    my ($serve, %options) = @_;
    my $daemon = FakeDaemon->start($serve);
    return ($daemon, CPANBridge->new(socket => $daemon->path, timeout => 60, %options));
}

subtest 'results come in the order of the calls' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    is_deeply([ $bridge->call_many([]) ], [], 'no calls');
    my @results = $bridge->call_many([ map { [ 'm', 'f', [$_] ] } 1 .. 1000 ]);
    is_deeply(\@results, [ map { [$_] } 1 .. 1000 ], 'a thousand');
    is_deeply(scalar $bridge->call_many([ [ 'm', 'f', 'x' ] ]), ['x'], 'a reference in scalar context');
    is($bridge->get_performance_stats->{total_calls}, 1001, 'all are counted');
    is($bridge->get_performance_stats->{reconnects},  0,    '... on one connection');
    ok(!eval { $bridge->call_many([ 'm', 'f' ]); 1 }, 'anything else than calls is refused');
};

subtest 'one failed call does not keep others from running' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    my @results = $bridge->call_many([ [ 'm', 'a', 1 ], [ 'm', 'b', sub { } ], [ undef, 'c' ], [ 'm', 'd', 4 ] ]);
    is($results[0] . $results[3], '14', 'the others have run');
    is($results[1]{error_type}, 'InvalidParams',  'one that cannot be sent');
    is($results[2]{error_type}, 'InvalidRequest', 'one without a module');
    @results = $bridge->call_many([ map { [ 'm', 'f', sub { } ] } 1 .. 1000 ]);
    is(scalar(grep { $_->{error_type} eq 'InvalidParams' } @results), 1000, 'a thousand that cannot be sent');
};

subtest 'a daemon that reads nothing while it cannot write' => sub {
    my ($daemon, $bridge) = bridge_to(sub { $_[0]->echo });
    my $text    = 'x' x 100_000;
    my @results = $bridge->call_many([ map { [ 'm', 'f', [ $_, $text ] ] } 1 .. 2000 ]);
    is(scalar @results, 2000, 'does not stop 200 MB in both directions');
    is(scalar(grep { ref $results[$_] eq 'ARRAY' && $results[$_][0] == $_ + 1 } 0 .. 1999), 2000, '... all in order');
};

subtest 'a lost connection' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            return $connection->echo if $number > 1;
            $connection->reply($connection->read_request) for 1 .. 10;
        }
    );
    my @results = $bridge->call_many([ map { [ 'm', "f$_", [$_] ] } 1 .. 1000 ]);
    is_deeply([ @results[ 0 .. 9 ] ], [ map { [$_] } 1 .. 10 ], 'replies before it hold');
    my @lost = grep { ref eq 'HASH' && $_->{error_type} eq 'WorkerLost' } @results;
    cmp_ok(scalar @lost, '>', 0,   'those in flight are lost');
    cmp_ok(scalar @lost, '<', 129, '... which are not many');
    is(scalar(grep { ref eq 'ARRAY' } @results), 1000 - @lost, '... and all others have run');
    my %times;
    $times{$_}++ for $daemon->noted;
    is(scalar(grep { $_ > 1 } values %times), 0, 'none twice');
};

subtest 'a frame of length 0' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->reply($connection->read_request) for 1 .. 100;
            $connection->no_more_requests;
        }
    );
    my @results = $bridge->call_many([ map { [ 'm', "f$_", [$_] ] } 1 .. 950 ]);
    is_deeply(\@results, [ map { [$_] } 1 .. 950 ], 'again and again loses nothing');
    my %times;
    $times{$_}++ for $daemon->noted;
    is(scalar(grep { $_ > 1 } values %times), 0, '... and runs nothing twice');
    is($bridge->get_performance_stats->{reconnects}, 9, '... on ten connections');
};

subtest 'a reply that is too large' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection, $number) = @_;
            while (1) {
                my $request = $connection->read_request;
                $connection->reply($request, $request->{function} eq 'f3' ? 'x' x 5000 : 1);
            }
        },
        max_json_size => 2000,
    );
    my @results = $bridge->call_many([ map { [ 'm', "f$_" ] } 1 .. 300 ]);
    is($results[2]{error_type}, 'ReplyTooLarge', 'is reported');
    is($results[1] . $results[299], '11', '... and the calls before and after it have run');
    is($results[3]{error_type}, 'WorkerLost', '... those sent with it may have');
    like($results[3]{error}, qr/given up because of the reply to call 3, which was too large; this call may have run/,
        '... with the reason');
};

subtest 'the timeout is for all' => sub {
    my ($daemon, $bridge) = bridge_to(
        sub {
            my ($connection) = @_;
            $connection->reply($connection->read_request) for 1 .. 5;
            $connection->wait_for_end;
        },
        timeout => 0.5,
    );
    my $begin   = CPANBridge::Clock::now();
    my @results = $bridge->call_many([ map { [ 'm', 'f', [$_] ] } 1 .. 500 ]);
    cmp_ok(CPANBridge::Clock::now() - $begin, '<', 3, 'and not for each');
    is_deeply($results[4], [5], 'replies before it hold');
    is($results[$_]{error_type}, 'RequestTimeout', "call $_") for 5, 499;
    like($results[5]{error},   qr/may have run/,      'one that was sent may have run');
    like($results[499]{error}, qr/not sent within/, 'one that was not has not');
};

done_testing;
